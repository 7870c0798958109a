// support/cpu without Python and PyTorch: every path of this processor against float64 from the bits, one line a path
// and case. For processors that one only has an emulator of, and for gdb and valgrind:
//
//     aarch64-linux-gnu-g++ -std=c++17 -O2 -static tests/robustness/kernel_alone.cpp -o kernel_alone
//     qemu-aarch64 kernel_alone
//     kernel_alone PATH ROWS COLUMNS BITS GROUP BATCH     once, without checking (to count its instructions)

#include "../../support/cpu/cpu.h"

#include <cstdio>
#include <cstdlib>
#include <random>

struct Case {
    int64_t rows, columns, n_bits, group, batch;
};

static double half_to_double(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return half >> 15 ? -size : size;
}

// A random layer of this shape, and x.
struct Layer {
    std::vector<int32_t> planes;
    std::vector<uint16_t> alpha, shift;
    std::vector<float> x;
    Job job{};

    explicit Layer(const Case& c) {
        std::mt19937 random(c.rows * 10 + c.batch);
        const int64_t tiles = (c.rows + TILE - 1) / TILE, words = c.columns / TILE, groups = c.columns / c.group;
        planes.resize(c.n_bits * tiles * words * TILE);
        alpha.resize(c.n_bits * tiles * groups * TILE);
        shift.resize(tiles * groups * TILE);
        x.resize(c.batch * c.columns);
        std::normal_distribution<float> normal;
        for (auto& word : planes) word = random();
        for (auto& a : alpha) a = (random() & 0x83ff) | (11 + random() % 4) << 10;  // +- 2^-4 .. 1
        for (auto& s : shift) s = (random() & 0x83ff) | (11 + random() % 6) << 10;  // +- 2^-4 .. 4
        for (auto& value : x) value = normal(random);
        job.planes = planes.data(), job.alpha = alpha.data(), job.shift = shift.data(), job.x = x.data();
        job.n_bits = c.n_bits, job.tiles = tiles, job.words = words, job.groups = groups;
        job.batch = c.batch, job.out_features = c.rows;
    }

    std::vector<float> multiply(const Path& path) {
        std::vector<float> y(job.batch * job.out_features, NAN), sums(job.batch * job.groups);
        std::vector<float> tables(job.batch * job.words * path.table_size);
        job.y = y.data(), job.sums = sums.data(), job.tables = tables.data();
        for (int64_t b = 0; b < job.batch; b++) {
            prepare_sums(job.x + b * job.words * TILE, job, sums.data() + b * job.groups);
            path.prepare(job.x + b * job.words * TILE, job, tables.data() + b * job.words * path.table_size);
        }
        path.run(job, 0, job.tiles);
        return y;
    }

    double weight(int64_t row, int64_t column) const {
        const int64_t t = row / TILE, r = row % TILE, g = column / (job.words * TILE / job.groups);
        double sum = half_to_double(shift[(t * job.groups + g) * TILE + r]);
        for (int64_t i = 0; i < job.n_bits; i++) {
            const bool bit = job.word(i, t, column / TILE)[r] >> column % TILE & 1;
            sum += (bit ? 1 : -1) * half_to_double(alpha[((i * job.tiles + t) * job.groups + g) * TILE + r]);
        }
        return sum;
    }

    // The largest difference of the dequantized weight to `weight`.
    double dequantizing_error(const Path& path) {
        double largest = 0;
        std::vector<float> tile(job.words * TILE * TILE);
        for (int64_t row = 0; row < job.out_features; row++) {
            if (row % TILE == 0) path.dequantize_tile(job, row / TILE, tile.data(), TILE);
            for (int64_t j = 0; j < job.words * TILE; j++)
                largest = std::max(largest, std::abs(tile[j * TILE + row % TILE] - weight(row, j)));
        }
        return largest;
    }

    // Of a token's error: the largest, relative to the sum of absolute products of the row; and its root mean square,
    // relative to that of the rows' norms of products.
    void errors(const std::vector<float>& y, double& largest, double& typical) const {
        largest = typical = 0;
        for (int64_t b = 0; b < job.batch; b++) {
            double error_squares = 0, product_squares = 0;
            for (int64_t row = 0; row < job.out_features; row++) {
                double exact = 0, absolute = 0;
                for (int64_t j = 0; j < job.words * TILE; j++) {
                    const double product = weight(row, j) * x[b * job.words * TILE + j];
                    exact += product;
                    absolute += std::abs(product);
                    product_squares += product * product;
                }
                const double error = y[b * job.out_features + row] - exact;
                error_squares += error * error;
                largest = std::isnan(error) ? INFINITY : std::max(largest, std::abs(error) / absolute);
            }
            typical = std::max(typical, std::sqrt(error_squares / product_squares));
        }
    }
};

int main(int count, char** arguments) {
    if (count == 7) {
        const auto number = [&](int i) { return std::atoll(arguments[i]); };
        Layer layer({number(2), number(3), number(4), number(5), number(6)});
        for (const Path& path : cpu_paths())
            if (path.name == arguments[1]) return std::isnan(layer.multiply(path)[0]);
        return 2;
    }
    bool good = true;
    for (const Path& path : cpu_paths())
        for (const Case& c : {Case{1, 32, 1, 32, 1}, Case{31, 96, 8, 32, 3}, Case{33, 576, 3, 64, 8},
                              Case{40, 576, 2, 192, 5}, Case{70, 1536, 4, 128, 2}, Case{64, 1024, 5, 1024, 1}}) {
            Layer layer(c);
            double largest, typical;
            layer.errors(layer.multiply(path), largest, typical);
            const bool int8 = path.name.find("int8") != std::string::npos;
            const bool close = (int8 ? typical < 0.01 : largest < 1e-6) && layer.dequantizing_error(path) < 1e-5;
            std::printf("%s %s %ld-%ld-%ld-%ld-%ld: largest %.1e, typical %.1e\n", close ? "good" : "WRONG",
                        path.name.c_str(), (long)c.rows, (long)c.columns, (long)c.n_bits, (long)c.group, (long)c.batch,
                        largest, typical);
            good = good && close;
        }
    return good ? 0 : 1;
}
