// y = x W^T from bit-planes on a CPU, and the door to the CUDA kernels of kernel.cu. The layout is in kernel.py.
//
// With w = sum_i alpha_i b_i + shift, a row of a group contributes
//     sum_i alpha_i * (sum_j b_ij x_j)  +  shift * (sum_j x_j)
// and the inner sums are looked up instead of added up: for every few columns, the sums of +-x_j over all sign patterns
// make a table that just fits into one vector register, and the bits of a plane, 8 or 16 rows at a time, are the
// indices into it. One shuffle is thus 8 x 3 (AVX2) or 16 x 4 (AVX-512) multiplications by +-1.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

extern "C" size_t bcq_matmul_workspace_bytes(int in_features);
extern "C" const char* bcq_matmul_cuda(const void* bit_planes, const void* alpha, const void* shift, const void* x,
                                       void* y, void* workspace, int type, int batch, int in_features,
                                       int out_features, int n_bits, int group_size, int path, void* stream);
#endif

constexpr int TILE = 32;  // rows side by side, and columns in a word
constexpr int MAX_BATCH = 8;
template <int LANES>
constexpr int COLUMNS = LANES == 16 ? 4 : 3;  // of a look-up: their signed sums fill a vector
template <int LANES>
constexpr int LOOKUPS = (TILE + COLUMNS<LANES> - 1) / COLUMNS<LANES>;  // in a word

struct Job {
    const int32_t* planes;    // (n_bits, tiles, words, 32)
    const uint16_t* alpha;    // (n_bits, tiles, groups, 32) fp16
    const uint16_t* shift;    // (tiles, groups, 32) fp16
    const float* x;           // (batch, 32 * words)
    float* y;                 // (batch, out_features)
    const float* tables;      // (batch, words, lookups in a word, lanes)
    const float* sums;        // (batch, groups): of x
    int64_t n_bits, tiles, words, groups, batch, out_features;

    const int32_t* word(int64_t i, int64_t t, int64_t c) const { return planes + ((i * tiles + t) * words + c) * TILE; }
};

// 32 finite fp16 numbers: their exponents are 112 too small, which also serves subnormal ones.
__attribute__((always_inline)) static inline void half_to_float(const uint16_t* half, float* out) {
    for (int r = 0; r < TILE; r++) {
        const uint32_t bits = (uint32_t)(int16_t)half[r] << 13 & 0x8fffe000u;  // sign, exponent and fraction in place
        float value;
        std::memcpy(&value, &bits, 4);
        out[r] = value * 0x1p112f;
    }
}

// alpha[i] and shift of the rows of tile t in group g, as float.
__attribute__((always_inline)) static inline void load_scales(const Job& job, int64_t t, int64_t g,
                                                              float (*alpha)[TILE], float* shift) {
    for (int64_t i = 0; i < job.n_bits; i++)
        half_to_float(job.alpha + ((i * job.tiles + t) * job.groups + g) * TILE, alpha[i]);
    half_to_float(job.shift + (t * job.groups + g) * TILE, shift);
}

__attribute__((always_inline)) static inline void store_tile(const Job& job, int64_t b, int64_t t, const void* y) {
    const int64_t rows = std::min<int64_t>(TILE, job.out_features - t * TILE);  // the last tile may end in padding
    std::memcpy(job.y + b * job.out_features + t * TILE, y, rows * sizeof(float));
}

// What the other paths compute, in the obvious way.
static void scalar(const Job& job, int64_t begin, int64_t end) {
    const int64_t words_per_group = job.words / job.groups;
    float alpha[8][TILE], shift[TILE];
    for (int64_t b = 0; b < job.batch; b++)
        for (int64_t t = begin; t < end; t++) {
            float y[TILE] = {};
            for (int64_t c = 0; c < job.words; c++) {
                const int64_t g = c / words_per_group;
                if (c % words_per_group == 0) {
                    load_scales(job, t, g, alpha, shift);
                    for (int r = 0; r < TILE; r++) y[r] += shift[r] * job.sums[b * job.groups + g];
                }
                for (int64_t i = 0; i < job.n_bits; i++)
                    for (int r = 0; r < TILE; r++) {
                        float dot = 0;
                        for (int j = 0; j < TILE; j++) {
                            const float x = job.x[(b * job.words + c) * TILE + j];
                            dot += job.word(i, t, c)[r] >> j & 1 ? x : -x;
                        }
                        y[r] += alpha[i][r] * dot;
                    }
            }
            store_tile(job, b, t, y);
        }
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define LOOKUP
template <int LANES>
struct Vector {  // may be loaded from any address that its elements may have
    typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
    typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
};

// Tile t for TOKENS tokens from b on, which share the shifting of the words.
template <int LANES, int TOKENS>
__attribute__((always_inline)) static inline void multiply_tile(const Job& job, int64_t b, int64_t t) {
    using Floats = typename Vector<LANES>::Floats;
    using Words = typename Vector<LANES>::Words;
    constexpr int columns = COLUMNS<LANES>, lookups = LOOKUPS<LANES>, parts = TILE / LANES;
    constexpr int64_t ahead = 32 * TILE;  // a page: at its end the prefetching of the hardware would start anew
    const int64_t words_per_group = job.words / job.groups;
    float alpha[8][TILE], shift[TILE];
    Floats y[TOKENS][parts] = {};
    for (int64_t c = 0; c < job.words; c++) {
        const int64_t g = c / words_per_group;
        if (c % words_per_group == 0) {
            load_scales(job, t, g, alpha, shift);
            for (int k = 0; k < TOKENS; k++)
                for (int p = 0; p < parts; p++) y[k][p] += ((Floats*)shift)[p] * job.sums[(b + k) * job.groups + g];
        }
        for (int64_t i = 0; i < job.n_bits; i++) {
            const int32_t* source = job.word(i, t, c);
            Words word[parts];
            Floats sum[TOKENS][parts] = {};
            for (int r = 0; r < TILE; r += 16) __builtin_prefetch(source + r + ahead);
            for (int p = 0; p < parts; p++) word[p] = ((const Words*)source)[p];
#pragma GCC unroll 11
            for (int l = 0; l < lookups; l++) {
#pragma GCC unroll 4
                for (int k = 0; k < TOKENS; k++) {
                    const Floats entries = ((const Floats*)job.tables)[((b + k) * job.words + c) * lookups + l];
                    for (int p = 0; p < parts; p++) sum[k][p] += __builtin_shuffle(entries, word[p]);  // by the low bits
                }
                for (int p = 0; p < parts; p++) word[p] >>= columns;
            }
            for (int k = 0; k < TOKENS; k++)
                for (int p = 0; p < parts; p++) y[k][p] += ((Floats*)alpha[i])[p] * sum[k][p];
        }
    }
    for (int k = 0; k < TOKENS; k++) store_tile(job, b + k, t, y[k]);
}

template <int LANES>
__attribute__((always_inline)) static inline void lookup(const Job& job, int64_t begin, int64_t end) {
    constexpr int together = LANES == 16 ? 4 : 1;  // tokens: as many as there are registers for
    for (int64_t t = begin; t < end; t++) {
        int64_t b = 0;
        for (; b + together <= job.batch; b += together) multiply_tile<LANES, together>(job, b, t);
        for (; b < job.batch; b++) multiply_tile<LANES, 1>(job, b, t);
    }
}

__attribute__((target("avx512f,fma"))) static void avx512(const Job& job, int64_t begin, int64_t end) {
    lookup<16>(job, begin, end);
}
__attribute__((target("avx2,fma"))) static void avx2(const Job& job, int64_t begin, int64_t end) {
    lookup<8>(job, begin, end);
}
static void emulated(const Job& job, int64_t begin, int64_t end) {  // 16 lanes without AVX-512: slow, for tests
    lookup<16>(job, begin, end);
}
#endif

// tables[c][l][e] = the sum of +-x_j over the columns of lookup l in word c, + where bit j of e is set (columns beyond
// the word count 0). sums[g] = the sum of x over group g: the last entries, where all signs are +.
template <int LANES>
static void prepare(const float* x, const Job& job, float* tables, float* sums) {
    constexpr int columns = COLUMNS<LANES>;
    float sign[columns][LANES];
    for (int j = 0; j < columns; j++)
        for (int e = 0; e < LANES; e++) sign[j][e] = e >> j & 1 ? 1 : -1;
    std::memset(sums, 0, job.groups * sizeof(float));
    for (int64_t c = 0; c < job.words; c++) {
        float sum = 0;
        for (int first = 0; first < TILE; first += columns, tables += LANES) {
            float value[columns];
            for (int j = 0; j < columns; j++) value[j] = first + j < TILE ? x[c * TILE + first + j] : 0;
            for (int e = 0; e < LANES; e++) {
                tables[e] = 0;
                for (int j = 0; j < columns; j++) tables[e] += sign[j][e] * value[j];
            }
            sum += tables[LANES - 1];
        }
        sums[c * job.groups / job.words] += sum;
    }
}

struct Path {
    std::string name;
    int64_t table_size;  // floats for a word of x
    void (*prepare)(const float*, const Job&, float*, float*);
    void (*run)(const Job&, int64_t, int64_t);
};

// The paths of this CPU, best first, and one more for tests.
static std::vector<Path> cpu_paths() {
    std::vector<Path> paths;
#ifdef LOOKUP
    const bool fma = __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f")) paths.push_back({"avx512", 16 * LOOKUPS<16>, prepare<16>, avx512});
    if (fma && __builtin_cpu_supports("avx2")) paths.push_back({"avx2", 8 * LOOKUPS<8>, prepare<8>, avx2});
#endif
    paths.push_back({"scalar", 16 * LOOKUPS<16>, prepare<16>, scalar});  // needs the sums only
#ifdef LOOKUP
    paths.push_back({"emulated", 16 * LOOKUPS<16>, prepare<16>, emulated});
#endif
    return paths;
}

static void check(const at::Tensor& x, const at::Tensor& planes, const at::Tensor& alpha, const at::Tensor& shift,
                  int64_t out_features) {
    const int64_t tiles = (out_features + TILE - 1) / TILE;
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_floating_point(), "x is ", x.scalar_type(), " of shape ", x.sizes(),
                      ", expected floats of shape (..., in_features)");
    TORCH_CHECK_VALUE(planes.dim() == 4 && planes.size(3) == TILE && alpha.dim() == 4,
                      "bit_planes ", planes.sizes(), " and alpha ", alpha.sizes(), " are not laid out as in kernel.py");
    const int64_t n_bits = planes.size(0), words = planes.size(2), groups = alpha.size(2);
    TORCH_CHECK_VALUE(n_bits >= 1 && n_bits <= 8, n_bits, " bit-planes: 1 to 8 are possible");
    TORCH_CHECK_VALUE(x.size(-1) == TILE * words, "x has ", x.size(-1), " columns, the bit-planes have ", TILE * words);
    TORCH_CHECK_VALUE(1 <= x.numel() && x.numel() <= MAX_BATCH * TILE * words, x.numel() / (TILE * words),
                      " rows of x: 1 to 8 are possible");
    TORCH_CHECK_VALUE(planes.size(1) == tiles, "the bit-planes hold ", planes.size(1), " tiles of 32 rows, ",
                      out_features, " rows need ", tiles);
    TORCH_CHECK_VALUE(groups >= 1 && words % groups == 0, groups, " groups do not divide ", words, " words");
    const at::DimVector alpha_shape{n_bits, tiles, groups, TILE}, shift_shape{tiles, groups, TILE};
    TORCH_CHECK_VALUE(alpha.sizes() == alpha_shape, "alpha is ", alpha.sizes(), ", expected ", at::IntArrayRef(alpha_shape));
    TORCH_CHECK_VALUE(shift.sizes() == shift_shape, "shift is ", shift.sizes(), ", expected ", at::IntArrayRef(shift_shape));
    TORCH_CHECK_VALUE(planes.scalar_type() == at::kInt && alpha.scalar_type() == at::kHalf &&
                          shift.scalar_type() == at::kHalf,
                      "bit_planes, alpha, shift are ", planes.scalar_type(), ", ", alpha.scalar_type(), ", ",
                      shift.scalar_type(), ", expected int32, fp16, fp16");
    for (const auto& tensor : {planes, alpha, shift}) {
        TORCH_CHECK_VALUE(tensor.is_contiguous(), "bit_planes, alpha and shift must be contiguous");
        TORCH_CHECK_VALUE(tensor.device() == x.device(), "x is on ", x.device(), ", the weight on ", tensor.device());
    }
}

static at::DimVector shape_of_result(const at::Tensor& x, int64_t out_features) {
    at::DimVector shape(x.sizes());
    shape.back() = out_features;
    return shape;
}

static at::Tensor multiply_cpu(const at::Tensor& x, const at::Tensor& planes, const at::Tensor& alpha,
                               const at::Tensor& shift, int64_t out_features, const Path& path) {
    const auto x32 = x.to(at::kFloat).contiguous();
    const int64_t words = planes.size(2), groups = alpha.size(2), batch = x.numel() / (TILE * words);
    const int64_t table_size = words * path.table_size;
    auto y = at::empty(shape_of_result(x, out_features), x32.options());
    const auto scratch = at::empty({batch * (table_size + groups)}, x32.options());
    float *table = scratch.mutable_data_ptr<float>(), *sum = table + batch * table_size;
    const Job job{planes.const_data_ptr<int32_t>(), (const uint16_t*)alpha.const_data_ptr(),
                  (const uint16_t*)shift.const_data_ptr(), x32.const_data_ptr<float>(), y.mutable_data_ptr<float>(),
                  table, sum, planes.size(0), planes.size(1), words, groups, batch, out_features};
    for (int64_t b = 0; b < batch; b++)
        path.prepare(job.x + b * words * TILE, job, table + b * table_size, sum + b * groups);
    at::parallel_for(0, job.tiles, 1, [&](int64_t begin, int64_t end) { path.run(job, begin, end); });
    return y.to(x.scalar_type());
}

#ifdef WITH_CUDA
static at::Tensor multiply_cuda(const at::Tensor& x, const at::Tensor& planes, const at::Tensor& alpha,
                                const at::Tensor& shift, int64_t out_features, const std::string& path) {
    const c10::cuda::CUDAGuard guard(x.device());
    const auto input = x.contiguous();
    const int64_t in_features = x.size(-1), batch = x.numel() / in_features;
    auto y = at::empty(shape_of_result(x, out_features), x.options());
    auto workspace = at::empty({(int64_t)bcq_matmul_workspace_bytes(in_features)}, x.options().dtype(at::kByte));
    const int type = x.scalar_type() == at::kFloat ? 0 : x.scalar_type() == at::kHalf ? 1
                     : x.scalar_type() == at::kBFloat16 ? 2 : 3;
    const char* error = bcq_matmul_cuda(
        planes.const_data_ptr(), alpha.const_data_ptr(), shift.const_data_ptr(), input.const_data_ptr(),
        y.mutable_data_ptr(), workspace.mutable_data_ptr(), type, batch, in_features, out_features, planes.size(0),
        in_features / alpha.size(2), path == "readable" ? 1 : path == "fast" ? 2 : 0, c10::cuda::getCurrentCUDAStream());
    TORCH_CHECK_VALUE(error == nullptr, error);
    return y;
}
#endif

// x: (..., in_features) with 1 to 8 rows; the rest as in kernel.py. Returns (..., out_features) in the dtype of x.
static at::Tensor multiply(const at::Tensor& x, const at::Tensor& planes, const at::Tensor& alpha,
                           const at::Tensor& shift, int64_t out_features, const std::string& name) {
    check(x, planes, alpha, shift, out_features);
#ifdef WITH_CUDA
    if (x.is_cuda()) return multiply_cuda(x, planes, alpha, shift, out_features, name);
#endif
    TORCH_CHECK_VALUE(x.is_cpu(), "no kernel for ", x.device());
    static const std::vector<Path> paths = cpu_paths();
    for (const Path& path : paths)
        if (path.name == name) return multiply_cpu(x, planes, alpha, shift, out_features, path);
    TORCH_CHECK_VALUE(false, "this CPU has no path called ", name);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("multiply", &multiply);
#ifdef WITH_CUDA
    module.attr("cuda") = true;
#endif
    module.def("cpu_paths", [] {
        std::vector<std::string> names;
        for (const Path& path : cpu_paths()) names.push_back(path.name);
        return names;
    });
}
