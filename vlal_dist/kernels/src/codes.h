// The term of each attribute of a row, and the draw of Fig. 3, by a team in shared memory.
#ifndef VLAL_CODES_H
#define VLAL_CODES_H

#include "checks.h"
#include "draw.h"

// Bytes of shared memory that the codes of a row take: whole words, the last ones idle.
VLAL_INLINE int code_bytes(int size) { return (size + 15) / 16 * 16; }

VLAL_INLINE void clear_codes(unsigned char* code, int size) {
  EACH_LANE(lane)
    const Words infeasible = {{0x03030303u, 0x03030303u, 0x03030303u, 0x03030303u}};
    for (int n = lane; n < code_bytes(size) / 16; n += kTeam) ((Words*)code)[n] = infeasible;
  END_LANES
}

// Codes of the object's attributes; `problem` of each lane if these are no set.
VLAL_INLINE void mark_feasible(const Arguments& a, vlal_i64 row, unsigned char* code, int size,
                               PerLane<vlal_u32>& problem) {
  const vlal_i64 object = a.object_id[row], start = a.feasible_indptr[object];
  const int members = (int)(a.feasible_indptr[object + 1] - start);
  const int* index = a.feasible_index + start;
  EACH_LANE(lane)
    for (int n = lane; n < members; n += kTeam) {
      const int attribute = index[n];
      if (attribute < 0 || attribute >= size || (n > 0 && attribute <= index[n - 1])) {
        problem[lane] = kBadSet;
      } else {
        code[attribute] = kFeasible;
      }
    }
  END_LANES
}

VLAL_INLINE void annotate(const Arguments& a, vlal_i64 row, unsigned char* code, int size,
                          PerLane<vlal_u32>& problem) {
  if (a.label) {
    const signed char* label = a.label + row * size;
    const int lead = (int)((4 - (vlal_u64)label % 4) % 4);  // bytes before the first whole word
    const int first = lead < size ? lead : size, words = (size - first) / 4;
    EACH_LANE(lane)
      for (int n = lane; n < words; n += kTeam) {
        const vlal_u32 four = ((const vlal_u32*)(label + first))[n];
        if (!four) continue;
        for (int k = 0; k < 4; ++k) {
          const signed char one = (signed char)(four >> 8 * k);
          if (one) code[first + 4 * n + k] = one > 0 ? kPositive : kNegative;
          if (one < -1 || one > 1) problem[lane] = kBadLabel;
        }
      }
      for (int n = lane; n < size - 4 * words; n += kTeam) {
        const int at = n < first ? n : 4 * words + n;
        if (label[at]) code[at] = label[at] > 0 ? kPositive : kNegative;
        if (label[at] < -1 || label[at] > 1) problem[lane] = kBadLabel;
      }
    END_LANES
    return;
  }
  const vlal_i64 start = a.label_indptr[row];
  const int annotated = (int)(a.label_indptr[row + 1] - start);
  EACH_LANE(lane)
    for (int n = lane; n < annotated; n += kTeam) {
      const int pair = a.label_code[start + n];
      if (pair < 0 || pair >> 1 >= size) {
        problem[lane] = kBadLabel;
      } else {
        code[pair >> 1] = pair & 1 ? kPositive : kNegative;
      }
    }
  END_LANES
}

// The race keys of the row's feasible attributes, and which of them are drawn.
struct Race {
  vlal_u32* keys;
  const int* index;
  int size;
  vlal_u32 threshold, ties;  // drawn: below the threshold, and so many of those that equal it
};

// Problem, the same for all lanes.
VLAL_INLINE vlal_u32 run_race(const Arguments& a, vlal_i64 row, unsigned char* code, Race& race) {
  const bool dense = a.weight_indptr == nullptr;
  const float* weight = a.inverse_weight + (dense ? row * a.attributes : a.weight_indptr[row]);
  const vlal_u64 uid = (vlal_u64)a.uid[row], seed = (vlal_u64)*a.seed;
  const vlal_u32 visit = (vlal_u32)a.visit[row];
  PerLane<vlal_u32> least, most, usable;
  EACH_LANE(lane)
    least[lane] = VLAL_NOT_DRAWN;
    most[lane] = usable[lane] = 0;
    for (int n = lane; n < race.size; n += kTeam) {
      const vlal_u32 attribute = (vlal_u32)race.index[n];
      vlal_u32 c0 = attribute >> 2, c1 = visit, c2 = (vlal_u32)uid, c3 = (vlal_u32)(uid >> 32);
      vlal_u32 k0 = (vlal_u32)seed, k1 = (vlal_u32)(seed >> 32);
      VLAL_PHILOX(c0, c1, c2, c3, k0, k1)
      const vlal_u32 low = attribute & 1 ? c1 : c0, high = attribute & 1 ? c3 : c2;
      const float one = weight[dense ? (int)attribute : n];
      vlal_u32 key = vlal_key_bits(attribute & 2 ? high : low, one);
      const bool taken = a.over_unannotated && code[attribute] != kFeasible;
      if (taken && key != VLAL_REFUSED) key = VLAL_NOT_DRAWN;
      race.keys[n] = key;
      if (key == VLAL_NOT_DRAWN) continue;
      least[lane] = key < least[lane] ? key : least[lane];
      most[lane] = key > most[lane] ? key : most[lane];
      usable[lane] += 1;
    }
  END_LANES
  vlal_u32 low = team_reduce<Least>(least), high = team_reduce<Most>(most);
  if (high == VLAL_REFUSED) return kBadWeight;
  const vlal_u32 able = team_sum(usable);
  const vlal_u32 wanted = (vlal_u64)a.num_ignore < able ? (vlal_u32)a.num_ignore : able;
  race.threshold = race.ties = 0;
  if (wanted == 0) return kFine;
  race.threshold = high + 1;
  if (wanted == able) return kFine;
  // The wanted-th smallest key, by halving the range of its bits.
  PerLane<vlal_u32> count;
  while (low < high) {
    const vlal_u32 middle = low + (high - low) / 2;
    EACH_LANE(lane)
      count[lane] = 0;
      for (int n = lane; n < race.size; n += kTeam) count[lane] += race.keys[n] <= middle;
    END_LANES
    const vlal_u32 found = team_sum(count);
    race.threshold = middle + 1;
    if (found == wanted) return kFine;
    if (found < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  // Several keys are the wanted-th: the lower attributes go first.
  EACH_LANE(lane)
    count[lane] = 0;
    for (int n = lane; n < race.size; n += kTeam) count[lane] += race.keys[n] < high;
  END_LANES
  race.threshold = high;
  race.ties = wanted - team_sum(count);
  return kFine;
}

// Problem, the same for all lanes. `listed`: whether the drawn attributes are written out, where
// that is wanted.
VLAL_INLINE vlal_u32 draw(const Arguments& a, vlal_i64 row, unsigned char* code, vlal_u32* keys,
                          bool listed) {
  const vlal_i64 object = a.object_id[row], start = a.feasible_indptr[object];
  Race race = {keys, a.feasible_index + start, (int)(a.feasible_indptr[object + 1] - start), 0, 0};
  if (a.num_ignore == 0 || race.size == 0) return kFine;
  if (a.num_ignore < 0) {
    EACH_LANE(lane)
      for (int n = lane; n < race.size; n += kTeam) {
        if (code[race.index[n]] == kFeasible) code[race.index[n]] = kIgnored;
      }
    END_LANES
    return kFine;
  }
  const vlal_u32 problem = run_race(a, row, code, race);
  if (problem) return problem;
  // Lower attributes go first, in the list and among equal keys, so that places are counted.
  PerLane<vlal_u32> drawn, tied;
  vlal_u32 place_of_next = 0, ties = 0;
  for (int start = 0; start < race.size; start += kTeam) {
    EACH_LANE(lane)
      const int n = start + lane;
      tied[lane] = n < race.size && keys[n] == race.threshold;
    END_LANES
    const vlal_u32 tied_here = race.ties ? team_before(tied) : 0;
    EACH_LANE(lane)
      const int n = start + lane;
      const bool tie = n < race.size && keys[n] == race.threshold && ties + tied[lane] < race.ties;
      drawn[lane] = tie || (n < race.size && keys[n] < race.threshold);
      if (drawn[lane] && code[race.index[n]] == kFeasible) code[race.index[n]] = kIgnored;
    END_LANES
    ties += tied_here;
    if (!a.drawn_out || !listed) continue;
    PerLane<vlal_u32> place = drawn;
    const vlal_u32 drawn_here = team_before(place);
    EACH_LANE(lane)
      int* list = a.drawn_out + row * a.drawn_per_row + place_of_next;
      if (drawn[lane]) list[place[lane]] = race.index[start + lane];
    END_LANES
    place_of_next += drawn_here;
  }
  return kFine;
}

// Problem, the same for all lanes; `listed` as in `draw`.
VLAL_INLINE vlal_u32 lay_out(const Arguments& a, vlal_i64 row, unsigned char* code, vlal_u32* keys,
                             bool listed) {
  const int size = (int)a.attributes;
  PerLane<vlal_u32> problem;
  EACH_LANE(lane)
    problem[lane] = kFine;
  END_LANES
  clear_codes(code, size);
  mark_feasible(a, row, code, size, problem);
  annotate(a, row, code, size, problem);
  if (VLAL_MODE == kList) {
    EACH_LANE(lane)
      for (int n = lane; n < (int)a.drawn_per_row; n += kTeam) {
        const int one = a.drawn[row * a.drawn_per_row + n];
        if (one < -1 || one >= size) {
          problem[lane] = kBadDrawn;
        } else if (one >= 0 && code[one] >= kFeasible) {
          code[one] = kIgnored;
        }
      }
    END_LANES
  }
  if (VLAL_MODE == kIgnoreAll || VLAL_MODE == kMask) {
    EACH_LANE(lane)
      for (int n = lane; n < size; n += kTeam) {
        const bool ignored = VLAL_MODE == kIgnoreAll || a.ignored[row * size + n];
        if (ignored && code[n] >= kFeasible) code[n] = kIgnored;
      }
    END_LANES
  }
  const vlal_u32 found = team_reduce<Most>(problem);
  if (found || VLAL_MODE != kDraw) return found;
  return draw(a, row, code, keys, listed);
}

#endif
