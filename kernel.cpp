// The binding of the kernels to PyTorch: support/cpu/cpu.h for a CPU, kernel.cu for a GPU. It checks what it is given,
// so that no kernel reads past an end.

#include "support/cpu/cpu.h"

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

extern "C" size_t bcq_matmul_workspace_bytes(int in_features);
extern "C" const char* bcq_matmul_cuda(const void* bit_planes, const void* alpha, const void* shift, const void* x,
                                       void* y, void* workspace, int type, int batch, int in_features,
                                       int out_features, int n_bits, int group_size, int path, void* stream);
extern "C" const char* bcq_dequantize_cuda(const void* bit_planes, const void* alpha, const void* shift, void* weight,
                                           int type, int in_features, int out_features, int n_bits, int group_size,
                                           void* stream);
#endif

constexpr int64_t PIECE = 8;         // rows of x that the kernels multiply at once
constexpr int64_t FEW = 32;          // up to about this many rows of x, pieces are faster than dequantizing
constexpr int64_t FEW_ON_GPU = 64;   // the same on a GPU, calculated, not measured (docs/kernels.md)
constexpr int64_t BUFFER = 4 << 20;  // bytes of dequantized weights at once; they should stay in a cache

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
    TORCH_CHECK_VALUE(x.numel(), "0 rows of x: any other number is possible");
    TORCH_CHECK_VALUE(planes.size(1) == tiles, "the bit-planes hold ", planes.size(1), " tiles of 32 rows, ",
                      out_features, " rows need ", tiles);
    TORCH_CHECK_VALUE(groups >= 1 && words % groups == 0, groups, " groups do not divide ", words, " words");
    const at::DimVector alpha_shape{n_bits, tiles, groups, TILE}, shift_shape{tiles, groups, TILE};
    TORCH_CHECK_VALUE(alpha.sizes() == alpha_shape, "alpha is ", alpha.sizes(), ", expected ",
                      at::IntArrayRef(alpha_shape));
    TORCH_CHECK_VALUE(shift.sizes() == shift_shape, "shift is ", shift.sizes(), ", expected ",
                      at::IntArrayRef(shift_shape));
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

// run(begin, end) over parts of 0 .. count, on PyTorch's threads. at::parallel_for would be compiled here and have
// threads only with the OpenMP that PyTorch was built with; iterating over a tensor of `count` elements runs PyTorch's
// own code.
template <class Run>
static void parallel(int64_t count, const Run& run) {
    if (at::get_num_threads() == 1) return run(0, count);
    auto elements = at::empty({count}, at::kByte);
    auto iterator = at::TensorIterator::nullary_op(elements);
    const char* first = (const char*)elements.const_data_ptr();
    const auto part = [&](char** data, const int64_t*, int64_t n, int64_t) {
        const int64_t begin = data[0] - first;
        run(begin, begin + n);
    };
    iterator.for_each(part, 1);
}

// x: (batch, in_features) with 1 to 8 rows, straight from the bits.
static at::Tensor multiply_piece(const at::Tensor& x, Job job, const Path& path) {
    const auto x32 = x.to(at::kFloat).contiguous();
    const int64_t batch = x.size(0), table_size = job.words * path.table_size;
    const auto y = at::empty({batch, job.out_features}, x32.options());
    const auto scratch = at::empty({batch * (table_size + job.groups)}, x32.options());
    float *tables = scratch.mutable_data_ptr<float>(), *sums = tables + batch * table_size;
    job.x = x32.const_data_ptr<float>(), job.y = y.mutable_data_ptr<float>();
    job.tables = tables, job.sums = sums, job.batch = batch;
    for (int64_t b = 0; b < batch; b++) {
        prepare_sums(job.x + b * job.words * TILE, job, sums + b * job.groups);
        path.prepare(job.x + b * job.words * TILE, job, tables + b * table_size);
    }
    parallel(job.tiles, [&](int64_t begin, int64_t end) { path.run(job, begin, end); });
    return y.to(x.scalar_type());
}

// Any number of rows of x: the weight is dequantized a few tiles at a time, each multiplied while it is in a cache.
static at::Tensor multiply_dequantized(const at::Tensor& x, const Job& job, const Path& path) {
    // bfloat16 is multiplied as such, for the processors that can; anything else in float32
    const auto rows = x.to(x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat);
    const auto y = at::empty({x.size(0), job.out_features}, rows.options());
    const int64_t columns = TILE * job.words;
    const int64_t together = std::clamp<int64_t>(BUFFER / (columns * TILE * 4), 1, 8);  // tiles
    const auto buffer = at::empty({columns, together * TILE}, rows.options().dtype(at::kFloat));
    float* out = buffer.mutable_data_ptr<float>();

    for (int64_t t = 0; t < job.tiles; t += together) {
        const int64_t end = std::min(t + together, job.tiles);
        const int64_t width = std::min(end * TILE, job.out_features) - t * TILE;
        parallel(end - t, [&](int64_t first, int64_t last) {
            for (int64_t k = first; k < last; k++) path.dequantize_tile(job, t + k, out + k * TILE, together * TILE);
        });
        auto part = y.narrow(1, t * TILE, width);
        at::mm_out(part, rows, buffer.narrow(1, 0, width).to(rows.scalar_type()));
    }
    return y.to(x.scalar_type());
}

static at::Tensor multiply_cpu(const at::Tensor& x, const at::Tensor& planes, const at::Tensor& alpha,
                               const at::Tensor& shift, int64_t out_features, const std::string& name) {
    static const std::vector<Path> paths = cpu_paths();
    const auto path = std::find_if(paths.begin(), paths.end(), [&](const Path& path) { return path.name == name; });
    TORCH_CHECK_VALUE(path != paths.end(), "this CPU has no path called ", name);

    Job job{};
    job.planes = planes.const_data_ptr<int32_t>();
    job.alpha = (const uint16_t*)alpha.const_data_ptr();
    job.shift = (const uint16_t*)shift.const_data_ptr();
    job.n_bits = planes.size(0), job.tiles = planes.size(1), job.words = planes.size(2), job.groups = alpha.size(2);
    job.out_features = out_features;

    const auto rows = x.reshape({-1, TILE * job.words});
    at::Tensor y;
    if (rows.size(0) <= PIECE) {
        y = multiply_piece(rows, job, *path);
    } else if (rows.size(0) <= FEW && name != "scalar") {
        y = at::empty({rows.size(0), out_features}, x.options());
        for (int64_t b = 0; b < rows.size(0); b += PIECE) {
            const int64_t size = std::min(PIECE, rows.size(0) - b);
            y.narrow(0, b, size).copy_(multiply_piece(rows.narrow(0, b, size), job, *path));
        }
    } else {
        y = multiply_dequantized(rows, job, *path);
    }
    return y.view(shape_of_result(x, out_features));
}

#ifdef WITH_CUDA
static at::Tensor multiply_cuda(const at::Tensor& x, const at::Tensor& planes, const at::Tensor& alpha,
                                const at::Tensor& shift, int64_t out_features, const std::string& path) {
    const c10::cuda::CUDAGuard guard(x.device());
    const auto input = x.contiguous();
    const int64_t in_features = x.size(-1), batch = x.numel() / in_features;
    const int type = x.scalar_type() == at::kFloat ? 0 : x.scalar_type() == at::kHalf ? 1
                     : x.scalar_type() == at::kBFloat16 ? 2 : 3;
    const int n_bits = planes.size(0), group_size = in_features / alpha.size(2);
    void* stream = c10::cuda::getCurrentCUDAStream();

    if (batch > FEW_ON_GPU) {
        auto weight = at::empty({out_features, in_features}, x.options());
        const char* error = bcq_dequantize_cuda(planes.const_data_ptr(), alpha.const_data_ptr(), shift.const_data_ptr(),
                                                weight.mutable_data_ptr(), type, in_features, out_features, n_bits,
                                                group_size, stream);
        TORCH_CHECK_VALUE(error == nullptr, error);
        return at::linear(input, weight);
    }

    auto y = at::empty(shape_of_result(x, out_features), x.options());
    auto workspace = at::empty({(int64_t)bcq_matmul_workspace_bytes(in_features)}, x.options().dtype(at::kByte));
    const char* error = bcq_matmul_cuda(
        planes.const_data_ptr(), alpha.const_data_ptr(), shift.const_data_ptr(), input.const_data_ptr(),
        y.mutable_data_ptr(), workspace.mutable_data_ptr(), type, batch, in_features, out_features, n_bits, group_size,
        path == "readable" ? 1 : path == "fast" ? 2 : 0, stream);
    TORCH_CHECK_VALUE(error == nullptr, error);
    return y;
}
#endif

// x: (..., in_features); the rest as in kernel.py. Returns (..., out_features) in the dtype of x.
static at::Tensor multiply(const at::Tensor& x, const at::Tensor& planes, const at::Tensor& alpha,
                           const at::Tensor& shift, int64_t out_features, c10::string_view name_) {
    const std::string name(name_);
    check(x, planes, alpha, shift, out_features);
#ifdef WITH_CUDA
    if (x.is_cuda()) return multiply_cuda(x, planes, alpha, shift, out_features, name);
#endif
    TORCH_CHECK_VALUE(x.is_cpu(), "no kernel for ", x.device());
    return multiply_cpu(x, planes, alpha, shift, out_features, name);
}

// The names of the paths that this CPU has, best first.
extern "C" __attribute__((visibility("default"))) const char* flexbcq_cpu_paths() {
    static const std::string names = [] {
        std::string joined;
        for (const Path& path : cpu_paths()) joined += path.name + std::string(" ");
        return joined;
    }();
    return names.c_str();
}

// torch.ops.flexbcq: operators that torch.compile, torch.export and tracing see.
TORCH_LIBRARY(flexbcq, library) {
    library.def(
        "multiply(Tensor x, Tensor bit_planes, Tensor alpha, Tensor shift, int out_features, str path) -> Tensor");
    library.impl("multiply", c10::DispatchKey::CPU, &multiply);
#ifdef WITH_CUDA
    library.impl("multiply", c10::DispatchKey::CUDA, &multiply);
#endif
}
