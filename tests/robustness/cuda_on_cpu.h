// As much of CUDA as kernel.cu uses, for g++: its very source then runs on a CPU, in a test or step by step in gdb.
//
//     g++ -std=c++17 -g -fno-strict-aliasing -x c++ -include tests/robustness/cuda_on_cpu.h kernel.cu ...
//
// Each thread of a block is a fiber: a stack of its own, switched to and from by hand. Blocks run one after another, in
// an order drawn anew every time; so what they must leave for each other in time is not checked.
// Between two barriers the warps, and the lanes of a warp, run in an order drawn anew every time, and each as far as it
// can get: code that lacks a barrier then reads what is not there yet. Threads that wait at different barriers abort.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // one copy will do: blocks do not overlap
using std::max;
using std::min;

struct dim3 { unsigned x, y; dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {} };
struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- Threads and barriers ----
enum State { AT_WARP_BARRIER, AT_BLOCK_BARRIER, AT_END };
struct Fiber { ucontext_t context; State state; int exchanges; std::vector<char> stack = std::vector<char>(1 << 16); };
static std::vector<Fiber> fibers(1024);
static ucontext_t scheduler;
static std::function<void()> kernel_call;

static void wait_at(State barrier) {
    Fiber& self = fibers[threadIdx.x];
    self.state = barrier;
    swapcontext(&self.context, &scheduler);
}
static void __syncwarp() { wait_at(AT_WARP_BARRIER); }
static void __syncthreads() { wait_at(AT_BLOCK_BARRIER); }
static void run_thread() { kernel_call(), wait_at(AT_END); }

static void start(Fiber& fiber) {
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_thread, 0);
}

static std::vector<int> shuffled(int n) {
    static std::minstd_rand random;
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    return order;
}

// Calls advance(0) .. advance(n - 1) in some order; what they return, which must be the same for all.
template <typename Advance>
State advance_all(int n, Advance advance) {
    std::vector<int> order = shuffled(n);
    State state = advance(order[0]);
    for (int i = 1; i < n; i++)
        if (advance(order[i]) != state) std::fputs("a barrier that only some threads reach\n", stderr), std::abort();
    return state;
}

static State advance_lane(int thread) {  // to its next barrier
    threadIdx.x = thread;
    swapcontext(&scheduler, &fibers[thread].context);
    return fibers[thread].state;
}
static State advance_warp(int warp) {  // to the next barrier of the block
    State state;
    do state = advance_all(32, [=](int lane) { return advance_lane(warp * 32 + lane); });
    while (state == AT_WARP_BARRIER);
    return state;
}
static void run_block() {
    for (unsigned i = 0; i < blockDim.x; i++) start(fibers[i]);
    while (advance_all(blockDim.x / 32, advance_warp) != AT_END);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; cudaStream_t stream; };
struct cudaFuncAttributes { int ptxVersion; };
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel*) { return found->ptxVersion = 80, cudaSuccess; }
static cudaError_t cudaGetLastError() { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
static cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
static cudaError_t cudaDeviceGetAttribute(int* n, cudaDeviceAttr, int) { return *n = 8, cudaSuccess; }  // a small card
static const char* cudaGetErrorString(cudaError_t) { return "no error"; }

template <typename Kernel, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel* kernel, Arguments... arguments) {
    kernel_call = [=] { kernel(arguments...); };
    gridDim = config->gridDim, blockDim = config->blockDim;
    for (int block : shuffled(gridDim.x * gridDim.y)) {
        blockIdx = dim3(block % gridDim.x, block / gridDim.x);
        run_block();
    }
    return cudaSuccess;
}

static void __threadfence() {}  // what is written is there at once
static int atomicAdd(int* sum, int value) { return *sum += value, *sum - value; }

// ---- Numbers ----
struct __half { uint16_t bits; };
struct __half2 { __half x, y; };
struct __nv_bfloat16 { uint16_t bits; };
static uint4 __ldcs(const uint4* p) { return *p; }
static __half __ushort_as_half(uint16_t bits) { return {bits}; }
static uint16_t __half_as_ushort(__half h) { return h.bits; }

static float __half2float(__half h) {
    int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
    float size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    return h.bits >> 15 ? -size : size;
}
static __half __float2half(float x) {  // to the nearest, ties to even
    uint16_t sign = std::signbit(x) << 15;
    if (std::isnan(x)) return {0x7fff};
    if (std::fabs(x) >= 65520) return {uint16_t(sign | 0x7c00)};
    int exponent = std::max(x == 0 ? -14 : std::ilogb(x), -14);
    int mantissa = std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent));  // 1024 and more carries into the exponent
    return {uint16_t(sign | (((exponent + 14) << 10) + mantissa))};
}
static float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
static float __bfloat162float(__nv_bfloat16 b) {
    uint32_t bits = uint32_t(b.bits) << 16;
    return *(float*)&bits;
}
static __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits = *(uint32_t*)&x;
    return {uint16_t(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- What the lanes of a warp do together: all write, then all read; next time in the other half of the space ----
using Exchange = float[16][24];
static Exchange& exchange() {
    static Exchange space[32][2];
    return space[threadIdx.x / 32][fibers[threadIdx.x].exchanges++ % 2];
}
static float __shfl_xor_sync(unsigned, float value, int mask) {
    Exchange& lanes = exchange();
    int lane = threadIdx.x % 32, other = lane ^ mask;
    lanes[lane / 16][lane % 16] = value;
    __syncwarp();
    return lanes[other / 16][other % 16];
}
static void mma(float d[4], const unsigned a[4], const unsigned b[2]) {  // m16n8k16, as the PTX manual draws it
    Exchange& m = exchange();                                            // row k: a[k][0 .. 15], then b[k][0 .. 7]
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto half = [](unsigned pair, int i) { return __half2float({uint16_t(pair >> i * 16)}); };
    for (int i = 0; i < 8; i++) m[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = half(a[i / 2], i % 2);
    for (int i = 0; i < 4; i++) m[2 * t + i % 2 + i / 2 * 8][16 + g] = half(b[i / 2], i % 2);
    __syncwarp();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) d[i] += m[g + i / 2 * 8][k] * m[k][16 + 2 * t + i % 2];
}
