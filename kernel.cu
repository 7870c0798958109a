// Bit-planes times activations on a GPU: y = x @ W.T straight from the planes, 1 to 8 rows of x ("tokens") at a time.
//
//     bit_planes  (n_bits, out/32, in/32, 32) int32         word [i, t, c, r]: plane i, row 32t + r, columns 32c ..
//     alpha       (n_bits, out/32, in/group_size, 32) fp16  w = sum_i alpha_i b_i + shift, with b_i = +1 where the
//     shift       (out/32, in/group_size, 32) fp16          bit of plane i is 1, and -1 where it is 0
//     x, y        (batch, in), (batch, out)                 fp32, fp16 or bf16; sums are kept in fp32
//
// kernel.py gives the layout in full. Two kernels compute the same: `readable_kernel` is the definition and takes every
// shape, `fast_kernel` hands the planes to the tensor cores. In both, a block works on a tile of 32 rows and its warps
// share the columns among them; where that would leave a part of the card idle, several blocks of `fast_kernel` share a
// tile. At the end the sums of the warps, and then those of the blocks, are added in a fixed order: two runs on a card
// agree bit for bit, and a token goes through the same operations in any batch. For many tokens,
// `dequantize_kernel` writes the weight to memory once, and a cuBLAS matrix product does the rest.
//
// No PyTorch here, and nothing is allocated. tests/robustness/cuda_on_cpu.h lets g++ compile this file for a CPU.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

constexpr int TILE = 32;      // rows side by side, columns in a word, threads in a warp
constexpr int WARPS = 12;     // in a block of the readable kernel
constexpr int MAX_BATCH = 8;  // tokens at a time, and the n of the mma
constexpr int MAX_BITS = 8;
constexpr int CHUNK = 128;    // columns that a warp of the fast kernel takes at a time
constexpr int FAST_WARPS = 4;
constexpr int blocks_per_sm(int n_bits) { return n_bits < 4 ? 6 : 4; }  // of the fast kernel, as its registers allow
enum Type { FP32, FP16, BF16 };
enum Path { AUTO, READABLE, FAST };

__device__ float load(const void* x, int type, int i) {
    if (type == FP32) return ((const float*)x)[i];
    if (type == FP16) return __half2float(((const __half*)x)[i]);
    return __bfloat162float(((const __nv_bfloat16*)x)[i]);
}

__device__ void store(void* y, int type, int i, float value) {
    if (type == FP32) ((float*)y)[i] = value;
    if (type == FP16) ((__half*)y)[i] = __float2half(value);
    if (type == BF16) ((__nv_bfloat16*)y)[i] = __float2bfloat16(value);
}

using Sums = float[MAX_BATCH][TILE];  // [token, row of a tile], over some of the columns

__device__ float add(const Sums* sums, int n, int token, int row) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += sums[i][token][row];
    return sum;
}

// The end of both kernels: y is the total of the sums of the block's warps, added in the order of the warps. Where
// several blocks share a tile (gridDim.y), each leaves its total in memory, and the last to finish adds them in order.
__device__ void add_up(const Sums* of_warps, Sums* of_blocks, int* n_done, void* y, int type, int batch,
                       int out_features) {
    const Sums* sums = of_warps;
    int n = blockDim.x / TILE;
    __syncthreads();
    if (gridDim.y > 1) {
        of_blocks += blockIdx.x * gridDim.y;
        for (int i = threadIdx.x; i < batch * TILE; i += blockDim.x)
            of_blocks[blockIdx.y][i / TILE][i % TILE] = add(sums, n, i / TILE, i % TILE);
        __shared__ bool is_last;
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();  // all other blocks see these sums before they see this one counted
            is_last = atomicAdd(&n_done[blockIdx.x], 1) == int(gridDim.y) - 1;
            __threadfence();  // and this one sees theirs
        }
        __syncthreads();
        if (!is_last) return;
        sums = of_blocks, n = gridDim.y;
    }
    for (int i = threadIdx.x; i < batch * TILE; i += blockDim.x) {
        int token = i / TILE, row = blockIdx.x * TILE + i % TILE;
        float sum = add(sums, n, token, i % TILE);
        if (row < out_features) store(y, type, token * out_features + row, sum);  // the last tile may end in padding
    }
}

// ---- The readable kernel ----
using Words = int[TILE];      // one word of each row of a tile: 128 bytes, which a warp reads at once, one row per lane
using Scales = __half[TILE];  // one alpha or shift of each row

// A warp takes 32 columns at a time. Column by column, each lane rebuilds the weight of its row and multiplies
// it by x in that column.
template <int n_bits, int tokens>
__global__ void __launch_bounds__(WARPS * TILE)
readable_kernel(const Words* bit_planes, const Scales* alpha, const Scales* shift, const void* x, void* y, int type,
                int batch, int in_features, int out_features, int group_size) {
    __shared__ float x_tile[WARPS][tokens][TILE];
    __shared__ Sums partial[WARPS];
    int warp = threadIdx.x / TILE, lane = threadIdx.x % TILE;
    int words = in_features / TILE, groups = in_features / group_size;
    float sum[tokens] = {};
    for (int c = warp; c < words; c += WARPS) {
        for (int token = 0; token < tokens; token++)
            x_tile[warp][token][lane] = token < batch ? load(x, type, token * in_features + c * TILE + lane) : 0;
        __syncwarp();  // now every lane may read all 32 columns

        int group = c * TILE / group_size, word[n_bits];
        float lowest = __half2float(shift[blockIdx.x * groups + group][lane]), step[n_bits];
        for (int i = 0; i < n_bits; i++) {
            int tile = i * gridDim.x + blockIdx.x;
            word[i] = bit_planes[tile * words + c][lane];
            float a = __half2float(alpha[tile * groups + group][lane]);
            lowest -= a;      // the weight with no bit set
            step[i] = 2 * a;  // what a bit adds to it: from b = -1 to b = +1
        }
#pragma unroll(TILE / tokens)
        for (int column = 0; column < TILE; column++) {
            float weight = lowest;
            for (int i = 0; i < n_bits; i++)
                if (word[i] >> column & 1) weight += step[i];
            for (int token = 0; token < tokens; token++) sum[token] += weight * x_tile[warp][token][column];
        }
        __syncwarp();  // nobody needs these columns any more
    }
    for (int token = 0; token < tokens; token++) partial[warp][token][lane] = sum[token];
    add_up(partial, nullptr, nullptr, y, type, batch, out_features);
}

// ---- The weight itself ----
// A warp takes one word of every row of a tile and writes each word's 32 weights, row by row, one per lane: the
// planes are read once, and both reads and writes are contiguous in memory. Sums are in the order of `dequantize` in
// kernel.py, so they are the same bit for bit.
__global__ void __launch_bounds__(WARPS * TILE)
dequantize_kernel(const Words* bit_planes, const Scales* alpha, const Scales* shift, void* weight, int type,
                  int in_features, int out_features, int n_bits, int group_size) {
    __shared__ int word[WARPS][MAX_BITS][TILE];
    __shared__ float plus[WARPS][MAX_BITS][TILE], offset[WARPS][TILE];
    int warp = threadIdx.x / TILE, lane = threadIdx.x % TILE;
    int words = in_features / TILE, groups = in_features / group_size;
    int rows = min(TILE, out_features - int(blockIdx.x) * TILE);  // the last tile may end in padding
    for (int c = warp; c < words; c += WARPS) {
        int group = c * TILE / group_size;
        offset[warp][lane] = __half2float(shift[blockIdx.x * groups + group][lane]);
        for (int i = 0; i < n_bits; i++) {
            int tile = i * gridDim.x + blockIdx.x;
            word[warp][i][lane] = bit_planes[tile * words + c][lane];
            plus[warp][i][lane] = __half2float(alpha[tile * groups + group][lane]);
        }
        __syncwarp();  // until now a lane was a row, from here on it is a column
        for (int row = 0; row < rows; row++) {
            float sum = offset[warp][row];
            for (int i = 0; i < n_bits; i++) {
                float a = plus[warp][i][row];
                sum += word[warp][i][row] >> lane & 1 ? a : -a;
            }
            store(weight, type, (blockIdx.x * TILE + row) * in_features + c * TILE + lane, sum);
        }
        __syncwarp();  // nobody needs these words any more
    }
}

// ---- The fast kernel ----
// `word & 0x00010001 << p` leaves one bit in each half of a word. Read as fp16, such a half is 0 or a power of two,
// from 2^-17 for p = 7 to 2 for p = 14. So one AND makes two exact operands for the tensor cores, of columns q and
// q + 16, if x has been divided by that power. `word << 7` brings columns 0..7 and 16..23 to p = 7..14, and
// `word >> 1` brings columns 8..15 and 24..31 there.

// x as the mma wants it: 128 columns of up to 8 tokens. They are scaled by a power of two, so that the largest |x| of a
// token lies in [1/8, 1/4): then 2x / 2^-17 just fits into fp16, even if x is bf16 or an outlier. Rounding to fp16
// does not change an x above 2^-10 of the largest, and changes smaller ones by at most 2^-21 of the largest.
struct Chunk {
    unsigned pairs[4][MAX_BATCH][4][4];  // [v, token, t]: of word t the columns (q, q + 16) for q = 2v, 2v + 8, 2v + 1,
                                         // 2v + 9, times 2 / (the power of two that the mma sees in place of a bit)
    float2 scale_and_sum[MAX_BATCH];     // of a token: what undoes the scaling, and minus the sum of the scaled x
};

// Also sets the counters of blocks to 0.
__global__ void prepare_x(const void* x, int type, int in_features, Chunk* chunks, int* n_done, int n_counters) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n_counters; i += gridDim.x * blockDim.x) n_done[i] = 0;
    int token = threadIdx.x / TILE, lane = threadIdx.x % TILE, t = lane / 16, q = lane % 16;
    float value[2][2], largest = 0, sum = 0;
    for (int k = 0; k < 4; k++) {  // columns q and q + 16 of words t and t + 2
        int column = blockIdx.x * CHUNK + (t + k / 2 * 2) * TILE + q + k % 2 * 16;
        float v = value[k / 2][k % 2] = load(x, type, token * in_features + column);
        largest = fmaxf(largest, fabsf(v));
        sum += v;
    }
    for (int distance = 1; distance < TILE; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
        sum += __shfl_xor_sync(~0u, sum, distance);
    }
    int exponent;
    frexpf(largest, &exponent);  // 2^(exponent - 1) <= largest < 2^exponent
    float power = __half2float(__ushort_as_half(1 << (7 + q % 8)));
    for (int k = 0; k < 2; k++) {
        unsigned low = __half_as_ushort(__float2half(ldexpf(value[k][0], -exponent - 1) / power));
        unsigned high = __half_as_ushort(__float2half(ldexpf(value[k][1], -exponent - 1) / power));
        chunks[blockIdx.x].pairs[q % 8 / 2][token][t + 2 * k][q % 2 * 2 + q / 8] = high << 16 | low;
    }
    if (lane == 0) chunks[blockIdx.x].scale_and_sum[token] = {ldexpf(1, exponent + 2), -ldexpf(sum, -exponent - 2)};
}

#ifdef __CUDACC__
// d += a @ b on the tensor cores: a (16, 16) and b (16, 8) in fp16, d (16, 8) in fp32. Lane 4g + t holds, two fp16 to a
// register: of a, row g, columns 2t, 2t + 1; row g + 8, the same columns; both rows again, 8 columns further; of b,
// column g, rows 2t, 2t + 1, and 8 rows further; of d, row g, columns 2t, 2t + 1; row g + 8, the same columns.
__device__ void mma(float d[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
#endif

// Four rows at a time: 16 bytes of words and 8 bytes of scales are one load each.
using ChunkWords = uint4[4][TILE / 4];  // [t, g]: word t of rows 4g .. 4g + 3
using ChunkScales = uint2[TILE / 4];    // [g]

__device__ float2 scales_of(const uint2& four_rows, int r) {  // of rows r and r + 1
    return __half22float2(((const __half2*)&four_rows)[r / 2]);
}

// A warp takes 128 columns at a time, lane 4g + t word t of rows 4g .. 4g + 3. It puts rows 4g, 4g + 1 where
// the mma expects rows g, g + 8, and later 4g + 2, 4g + 3; and columns q, q + 16, q + 8, q + 24 of its word where the
// mma expects 2t, 2t + 1, 2t + 8, 2t + 9. Any order is right if x and y have the same.
template <int n_bits>
__global__ void __launch_bounds__(FAST_WARPS * TILE, blocks_per_sm(n_bits))  // so many registers, and loads in flight
fast_kernel(const ChunkWords* bit_planes, const ChunkScales* alpha, const ChunkScales* shift, const Chunk* x, void* y,
            int type, int batch, int chunks, int out_features, int groups, Sums* of_blocks, int* n_done) {
    __shared__ Sums partial[FAST_WARPS];
    int warp = threadIdx.x / TILE, lane = threadIdx.x % TILE, g = lane / 4, t = lane % 4, last = batch - 1;
    float groups_per_chunk = float(groups) / chunks;
    float total[4][2] = {};  // rows 4g .. 4g + 3, tokens 2t and 2t + 1
    int first_chunk = chunks * blockIdx.y / gridDim.y, end = chunks * (blockIdx.y + 1) / gridDim.y;  // of this block
    for (int chunk = first_chunk + warp; chunk < end; chunk += FAST_WARPS) {
        int group = (chunk + 0.5f) * groups_per_chunk;  // without a slow division
        uint4 words[n_bits], pairs[4];
        uint2 offset = shift[blockIdx.x * groups + group][g], scales[n_bits];
        for (int i = 0; i < n_bits; i++) {
            int tile = i * gridDim.x + blockIdx.x;
            words[i] = __ldcs(&bit_planes[tile * chunks + chunk][t][g]);  // used once: leave the cache to x
            scales[i] = alpha[tile * groups + group][g];
        }
        for (int v = 0; v < 4; v++)  // past the batch, repeat its last token: that is never stored
            pairs[v] = *(const uint4*)x[chunk].pairs[v][min(g, last)][t];
        float2 first = x[chunk].scale_and_sum[min(2 * t, last)], second = x[chunk].scale_and_sum[min(2 * t + 1, last)];
        __syncwarp();  // without it the compiler moves loads down to their first use, and each is waited for in turn

        for (int r = 0; r < 4; r += 2) {
            float2 s = scales_of(offset, r);
            float sum[2][2] = {{-s.x * first.y, -s.x * second.y}, {-s.y * first.y, -s.y * second.y}};
            for (int i = 0; i < n_bits; i++) {
                unsigned upper = ((const unsigned*)&words[i])[r], lower = ((const unsigned*)&words[i])[r + 1];
                float d[4] = {first.y, second.y, first.y, second.y};  // -sum x; with 2x for every 1 it is sum b x
                for (int q = 0; q < 8; q++) {
                    unsigned bit = 0x00010001 << (7 + q);
                    unsigned a[4] = {upper << 7 & bit, lower << 7 & bit, upper >> 1 & bit, lower >> 1 & bit};
                    mma(d, a, (const unsigned*)pairs + 2 * q);
                }
                float2 a = scales_of(scales[i], r);
                sum[0][0] += a.x * d[0], sum[0][1] += a.x * d[1], sum[1][0] += a.y * d[2], sum[1][1] += a.y * d[3];
            }
            for (int k = 0; k < 2; k++)
                total[r + k][0] += sum[k][0] * first.x, total[r + k][1] += sum[k][1] * second.x;
        }
    }
    for (int r = 0; r < 4; r++)
        for (int k = 0; k < 2; k++) partial[warp][2 * t + k][4 * g + r] = total[r][k];
    add_up(partial, of_blocks, n_done, y, type, batch, out_features);
}

// ---- Launching ----
// What `kernel<<<blocks, warps * 32, 0, stream>>>(...)` is short for.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int warps, void* stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(warps * TILE);
    config.stream = (cudaStream_t)stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int tokens>
auto readable_for(int n_bits) {
    static const decltype(&readable_kernel<1, tokens>) kernels[] = {
        readable_kernel<1, tokens>, readable_kernel<2, tokens>, readable_kernel<3, tokens>, readable_kernel<4, tokens>,
        readable_kernel<5, tokens>, readable_kernel<6, tokens>, readable_kernel<7, tokens>, readable_kernel<8, tokens>};
    return kernels[n_bits - 1];
}

// Was this file compiled with the mma for the current device? Code for an older card runs on a newer one.
static bool has_mma() {
    cudaFuncAttributes found;
    return cudaFuncGetAttributes(&found, fast_kernel<1>) == cudaSuccess && found.ptxVersion >= 80;
}

static const char* text_of(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // clear it: it is reported here and must not show up in the next check
    return cudaGetErrorString(error);
}

static const char* wrong(int type, int in_features, int n_bits, int group_size) {
    if (n_bits < 1 || n_bits > MAX_BITS) return "n_bits is not 1 to 8";
    if (type < FP32 || type > BF16) return "x is not fp32, fp16 or bf16";
    if (group_size < TILE || group_size % TILE || in_features % group_size) return "group_size does not fit";
    return nullptr;
}

// Blocks of the fast kernel that the current device runs at a time.
static int places(int n_bits) {
    int device = 0, n_sms = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    return n_sms * blocks_per_sm(n_bits);
}

// Bytes of device memory for the fast kernel, free for other use once y is computed: the chunks of x, then sums and
// counters of the blocks that share tiles; there are at most `places` of these blocks.
extern "C" size_t bcq_matmul_workspace_bytes(int in_features) {
    return in_features / CHUNK * sizeof(Chunk) + places(1) * (sizeof(Sums) + sizeof(int));
}

// y = x @ W.T on `stream` (a cudaStream_t). Tensors as in the header, contiguous, starting at a multiple of 16 bytes.
// AUTO takes the fast kernel where it can: sm_80 or later, x in fp16 or bf16 (fp32 has more digits than its operands),
// 1 to 4 bits, group_size a multiple of 128, and a workspace that is not null. Returns null, or what is wrong.
extern "C" const char* bcq_matmul_cuda(const void* bit_planes, const void* alpha, const void* shift, const void* x,
                                       void* y, void* workspace, int type, int batch, int in_features,
                                       int out_features, int n_bits, int group_size, int path, void* stream) {
    if (batch < 1) return "batch is less than 1";
    if (const char* what = wrong(type, in_features, n_bits, group_size)) return what;
    bool can_be_fast = type != FP32 && n_bits <= 4 && group_size % CHUNK == 0 && workspace && has_mma();
    if (path == FAST && !can_be_fast) return "the fast kernel does not take this";

    // more tokens than the kernels take are multiplied in pieces, one after the other
    if (batch > MAX_BATCH) {
        size_t size = type == FP32 ? 4 : 2;
        for (int first = 0; first < batch; first += MAX_BATCH) {
            const char* error = bcq_matmul_cuda(
                bit_planes, alpha, shift, (const char*)x + size * first * in_features,
                (char*)y + size * first * out_features, workspace, type, min(MAX_BATCH, batch - first), in_features,
                out_features, n_bits, group_size, path, stream);
            if (error) return error;
        }
        return nullptr;
    }

    int tiles = (out_features + TILE - 1) / TILE;
    cudaError_t error;
    if (path == READABLE || !can_be_fast) {
        auto kernel = batch == 1 ? readable_for<1>(n_bits) : readable_for<MAX_BATCH>(n_bits);
        error = launch(kernel, tiles, WARPS, stream, (const Words*)bit_planes, (const Scales*)alpha,
                       (const Scales*)shift, x, y, type, batch, in_features, out_features, group_size);
    } else {
        decltype(&fast_kernel<1>) kernels[] = {fast_kernel<1>, fast_kernel<2>, fast_kernel<3>, fast_kernel<4>};
        int chunks = in_features / CHUNK;
        int most = (chunks + FAST_WARPS - 1) / FAST_WARPS;          // with more, some warps would have nothing to do
        int per_tile = max(1, min(most, places(n_bits) / tiles));  // with more, some blocks would have to wait
        Chunk* prepared = (Chunk*)workspace;
        Sums* of_blocks = (Sums*)(prepared + chunks);
        int* n_done = (int*)(of_blocks + places(n_bits));
        error = launch(prepare_x, chunks, batch, stream, x, type, in_features, prepared, n_done, places(n_bits));
        if (error == cudaSuccess)
            error = launch(kernels[n_bits - 1], dim3(tiles, per_tile), FAST_WARPS, stream,
                           (const ChunkWords*)bit_planes, (const ChunkScales*)alpha, (const ChunkScales*)shift,
                           prepared, y, type, batch, chunks, out_features, in_features / group_size, of_blocks, n_done);
    }
    return text_of(error);
}

// weight, (out, in) in the given type, from its planes; below 2^31 elements. The rest as above.
extern "C" const char* bcq_dequantize_cuda(const void* bit_planes, const void* alpha, const void* shift, void* weight,
                                           int type, int in_features, int out_features, int n_bits, int group_size,
                                           void* stream) {
    if (const char* what = wrong(type, in_features, n_bits, group_size)) return what;
    int tiles = (out_features + TILE - 1) / TILE;
    return text_of(launch(dequantize_kernel, tiles, WARPS, stream, (const Words*)bit_planes, (const Scales*)alpha,
                          (const Scales*)shift, weight, type, in_features, out_features, n_bits, group_size));
}
