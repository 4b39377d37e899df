// The names of vlal_dist/kernels/src/team.h for a processor: a phase is a loop over its lanes.
#pragma once
#include <cmath>
#include <cstring>

#define VLAL_INLINE inline
#define VLAL_INLINE_MEMBER inline
#define OPTION(name) static constexpr float name = VLAL_##name;
#include "arguments.h"

constexpr int kTeam = VLAL_TEAM, kThreads = 256, kTeams = kThreads / kTeam;

#define EACH_TEAM(team) for (int team = 0; team < kTeams; ++team) {
#define END_TEAMS }
#define EACH_LANE(lane) for (int lane = 0; lane < kTeam; ++lane) {
#define END_LANES }

template <class T>
struct PerLane {
  T values[kTeam];
  T& operator[](int lane) { return values[lane]; }
};

struct Plus {
  template <class T>
  static T of(T a, T b) { return a + b; }
};
struct Least {
  template <class T>
  static T of(T a, T b) { return b < a ? b : a; }
};
struct Most {
  template <class T>
  static T of(T a, T b) { return a < b ? b : a; }
};

// The shuffles of the device, all lanes at once.
template <class Join, class T>
T team_reduce(PerLane<T>& lanes) {
  T total{};
  for (int warp = 0; warp < kTeam / 32; ++warp) {
    T value[32], next[32];
    for (int lane = 0; lane < 32; ++lane) value[lane] = lanes[32 * warp + lane];
    for (int away = 16; away > 0; away /= 2) {
      for (int lane = 0; lane < 32; ++lane) next[lane] = Join::of(value[lane], value[lane ^ away]);
      std::memcpy(value, next, sizeof value);
    }
    total = warp ? Join::of(total, value[0]) : value[0];
  }
  return total;
}

inline vlal_u32 team_before(PerLane<vlal_u32>& lanes) {
  vlal_u32 total = 0;
  for (int lane = 0; lane < kTeam; ++lane) {
    const vlal_u32 own = lanes[lane];
    lanes[lane] = total;
    total += own;
  }
  return total;
}

inline vlal_u32 team_sum(PerLane<vlal_u32>& lanes) { return team_reduce<Plus>(lanes); }

inline float fused(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float broadcast(float value) { return value; }
inline float select(bool mask, float a, float b) { return mask ? a : b; }
inline int bits_of(float v) { return __builtin_bit_cast(int, v); }
inline float float_of(int bits) { return __builtin_bit_cast(float, bits); }
inline float converted(int v) { return (float)v; }
inline float reciprocal(float v) { return 1.0f / v; }
inline float exp2_of(float v) { return std::exp2f(v); }
inline float log2_of(float v) { return std::log2f(v); }

inline float from_bfloat16(unsigned short bits) { return float_of((int)bits << 16); }
inline unsigned short to_bfloat16(float value) {
  const vlal_u32 bits = (vlal_u32)bits_of(value);
  if (value != value) return (unsigned short)((bits >> 16) | 0x40);
  return (unsigned short)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float from_float16(unsigned short bits) { return (float)__builtin_bit_cast(_Float16, bits); }
inline unsigned short to_float16(float value) {
  return __builtin_bit_cast(unsigned short, (_Float16)value);
}

// The device's assertion: its text is kept for the caller.
inline const char* failed = nullptr;
inline void fail(const char* text) { failed = text; }

struct alignas(16) Words {
  vlal_u32 word[4];
};
