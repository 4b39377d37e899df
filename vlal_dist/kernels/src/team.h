// A team of threads that works on one row of the batch, on the GPU.
//
// Code is written as phases: what stands between EACH_LANE and END_LANES is done by every lane,
// what stands outside by all of them alike. tests/kernels/emulation has the same names for a
// processor, where a phase is a loop.
#ifndef VLAL_TEAM_H
#define VLAL_TEAM_H

#define VLAL_INLINE static __device__ __forceinline__
#define VLAL_INLINE_MEMBER __device__ __forceinline__
#define OPTION(name) static constexpr float name = VLAL_##name;
#include "arguments.h"

// VLAL_TEAM lanes: a warp, or the whole block.
constexpr int kTeam = VLAL_TEAM, kThreads = 256, kTeams = kThreads / kTeam;

#define EACH_TEAM(team) { const int team = (int)threadIdx.x / kTeam;
#define END_TEAMS } __syncthreads();
#define EACH_LANE(lane) { const int lane = (int)threadIdx.x % kTeam;
#define END_LANES } team_barrier();

VLAL_INLINE void team_barrier() {
  if (kTeam == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// What a lane keeps from phase to phase.
template <class T>
struct PerLane {
  T value;
  __device__ __forceinline__ T& operator[](int) { return value; }
};

struct Plus {
  template <class T>
  static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};
struct Least {
  template <class T>
  static __device__ __forceinline__ T of(T a, T b) { return b < a ? b : a; }
};
struct Most {
  template <class T>
  static __device__ __forceinline__ T of(T a, T b) { return a < b ? b : a; }
};

// The same for all lanes, in an order that never changes.
template <class Join, class T>
VLAL_INLINE T team_reduce(PerLane<T>& lanes) {
  T value = lanes.value;
#pragma unroll
  for (int away = 16; away > 0; away /= 2) {
    value = Join::of(value, __shfl_xor_sync(0xFFFFFFFFu, value, away));
  }
  if (kTeam == 32) return value;
  __shared__ T warps[kThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) value = Join::of(value, warps[warp]);
  __syncthreads();
  return value;
}

// Each lane's number becomes the sum of those before it; the sum of all.
VLAL_INLINE vlal_u32 team_before(PerLane<vlal_u32>& lanes) {
  const vlal_u32 own = lanes.value;
  const int lane = (int)threadIdx.x % 32;
  vlal_u32 value = own;
#pragma unroll
  for (int away = 1; away < 32; away *= 2) {
    const vlal_u32 other = __shfl_up_sync(0xFFFFFFFFu, value, away);
    if (lane >= away) value += other;
  }
  vlal_u32 total = __shfl_sync(0xFFFFFFFFu, value, 31), before = 0;
  if (kTeam != 32) {
    __shared__ vlal_u32 warps[kThreads / 32];
    if (lane == 31) warps[threadIdx.x / 32] = value;
    __syncthreads();
    total = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      if (warp < (int)threadIdx.x / 32) before += warps[warp];
      total += warps[warp];
    }
    __syncthreads();
  }
  lanes.value = before + value - own;
  return total;
}

VLAL_INLINE vlal_u32 team_sum(PerLane<vlal_u32>& lanes) {
#if __CUDA_ARCH__ >= 800
  if (kTeam == 32) return __reduce_add_sync(0xFFFFFFFFu, lanes.value);
#endif
  return team_reduce<Plus>(lanes);
}

// Floats, as focal.h asks for.
VLAL_INLINE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
VLAL_INLINE float broadcast(float value) { return value; }
VLAL_INLINE float select(bool mask, float a, float b) { return mask ? a : b; }
VLAL_INLINE int bits_of(float v) { return __float_as_int(v); }
VLAL_INLINE float float_of(int bits) { return __int_as_float(bits); }
VLAL_INLINE float converted(int v) { return (float)v; }

VLAL_INLINE float reciprocal(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

VLAL_INLINE float exp2_of(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

VLAL_INLINE float log2_of(float v) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

VLAL_INLINE float from_bfloat16(unsigned short bits) { return __int_as_float((int)bits << 16); }
VLAL_INLINE unsigned short to_bfloat16(float value) {
#if __CUDA_ARCH__ >= 900
  unsigned short result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#else
  const vlal_u32 bits = (vlal_u32)__float_as_int(value);
  if (value != value) return (unsigned short)((bits >> 16) | 0x40);
  return (unsigned short)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
}
VLAL_INLINE float from_float16(unsigned short bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}
VLAL_INLINE unsigned short to_float16(float value) {
  unsigned short result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

// As `assert` does: its text goes to standard error, and the next call of CUDA fails.
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned int line,
                                        const char* function, decltype(sizeof(0)) char_size);
VLAL_INLINE void fail(const char* text) {
  __assertfail(text, "vlal_dist/kernels", 0, "selective_loss", 1);
}

struct alignas(16) Words {
  vlal_u32 word[4];
};

#endif
