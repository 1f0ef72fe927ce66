// float32 convolutions, and the product of a linear layer as one with a window of 1 x 1, on a packed weight.
//
// A convolution is a product: a row for each pixel of the result, which holds the numbers in its window. Rows are
// copied out of the map a few at a time, DEPTH of their numbers at a time, and stay in cache while they meet the whole
// weight; a tile of the product is summed in registers. Each block of DEPTH is summed apart and then added to the
// others, which keeps the rounding errors of long sums small. The order of adding is the same for every pixel.
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

constexpr int64_t DEPTH = 256;
constexpr int64_t STRIDE = DEPTH + 16;  // between copied rows, so that they do not share lines of the cache
constexpr int64_t PANEL = Convolve::PANEL;
constexpr int MOST = LANES == 16 ? 14 : 6;  // rows of a tile: its sums fill the registers
constexpr int64_t CHUNK = 4 * MOST;         // rows that are copied at a time
constexpr int64_t PER_THREAD = 1 << 18;     // multiplications that pay for waking a thread

int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One tile: `rows` x [copied rows of `depth` numbers] times two vectors of columns, into the pixels at `to`.
struct Tile {
    const float* rows;
    const float* weight;  // [depth, PANEL], from the first of these columns on
    float* const* to;     // [rows]: where these columns of each pixel lie
    const float* const* residual;
    const float* bias;
    int64_t depth, columns;
    bool first, last;  // of the blocks of DEPTH
};

template <int ROWS, int VECTORS>
void multiply(const Tile& t) {
    Floats sums[ROWS][VECTORS] = {};
    const float* weight = t.weight;
    const float* x = t.rows;
    for (int64_t k = 0; k < t.depth; ++k, weight += PANEL, ++x) {
        Floats columns[VECTORS];
        for (int v = 0; v < VECTORS; ++v) columns[v] = load(weight + v * LANES);
        for (int row = 0; row < ROWS; ++row)
            for (int v = 0; v < VECTORS; ++v) sums[row][v] += columns[v] * x[row * STRIDE];
    }
    for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t column = v * LANES;
            const auto finish = [&](auto... part) __attribute__((always_inline)) {
                float* to = t.to[row] + column;
                Floats sum = sums[row][v];
                if (!t.first) sum += load(to, part...);
                if (t.last && t.bias) sum += load(t.bias + column, part...);
                if (t.last && t.residual) sum += load(t.residual[row] + column, part...);
                store(to, part..., sum);
            };
            if (t.columns - column >= LANES)
                finish();
            else
                finish(static_cast<int>(t.columns - column));
        }
}

template <int ROWS>
void multiply(int rows, const Tile& tile) {
    if (rows == ROWS)
        tile.columns > LANES ? multiply<ROWS, 2>(tile) : multiply<ROWS, 1>(tile);
    else if constexpr (ROWS > 1)
        multiply<ROWS - 1>(rows, tile);
}

// A pixel of the result.
struct Pixel {
    int64_t map, line, column;
};

Pixel pixel_at(const Convolve& a, int64_t number) {
    const int64_t map = number / (a.out_height * a.out_width), rest = number % (a.out_height * a.out_width);
    return {map, rest / a.out_width, rest % a.out_width};
}

// Numbers `from` to from + depth of the pixel's window: tap by tap, each with its channels.
void copy_window(const Convolve& a, const Pixel& pixel, int64_t from, int64_t depth, float* to) {
    const float* map = a.x + pixel.map * a.height * a.width * a.channels;
    while (depth > 0) {
        const int64_t tap = from / a.channels, channel = from % a.channels;
        const int64_t count = smaller(a.channels - channel, depth);
        const int64_t line = pixel.line * a.stride + tap / a.window_width - a.top;
        const int64_t column = pixel.column * a.stride + tap % a.window_width - a.left;
        if (line >= 0 && line < a.height && column >= 0 && column < a.width)
            std::memcpy(to, map + (line * a.width + column) * a.channels + channel, sizeof(float) * count);
        else
            std::memset(to, 0, sizeof(float) * count);
        to += count, from += count, depth -= count;
    }
}

// Pixels `begin` to `end` of the result, at most CHUNK, panels `panel` to `last_panel`.
void convolve_chunk(const Convolve& a, int64_t begin, int64_t end, int64_t panel, int64_t last_panel) {
    alignas(64) float copied[CHUNK * STRIDE];
    Pixel pixels[CHUNK];
    float* results[CHUNK];
    const float* residuals[CHUNK];
    const int64_t rows = end - begin, tiles = ratio_up(rows, MOST);
    for (int64_t row = 0; row < rows; ++row) {
        const Pixel& p = pixels[row] = pixel_at(a, begin + row);
        const int64_t offset = p.map * a.result_map + p.line * a.result_line + p.column * a.result_pixel;
        results[row] = a.result + offset;
        if (a.residual) residuals[row] = a.residual + offset;
    }
    const int64_t whole = a.window_height * a.window_width * a.channels;
    for (int64_t from = 0; from < whole; from += DEPTH) {
        const int64_t depth = smaller(whole - from, DEPTH);
        for (int64_t row = 0; row < rows; ++row) copy_window(a, pixels[row], from, depth, copied + row * STRIDE);
        // A tile has two vectors of columns; a panel is a pair of AVX-512's.
        for (int64_t column = panel * PANEL; column < smaller(last_panel * PANEL, a.outputs); column += 2 * LANES) {
            const float* weight = a.weight + (column / PANEL * whole + from) * PANEL + column % PANEL;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = rows * tile / tiles, next = rows * (tile + 1) / tiles;
                float* to[MOST];
                const float* residual[MOST];
                for (int64_t row = first; row < next; ++row) {
                    to[row - first] = results[row] + column;
                    if (a.residual) residual[row - first] = residuals[row] + column;
                }
                multiply<MOST>(
                    static_cast<int>(next - first),
                    {copied + first * STRIDE, weight, to, a.residual ? residual : nullptr,
                     a.bias ? a.bias + column : nullptr, depth, a.outputs - column, from == 0, from + depth == whole});
            }
        }
    }
}

}  // namespace

// The threads share the pixels, or the panels where there are few pixels.
void convolve(const Convolve& a) {
    const int64_t pixels = a.maps * a.out_height * a.out_width, panels = ratio_up(a.outputs, PANEL);
    const int64_t work = pixels * a.outputs * a.window_height * a.window_width * a.channels;
    const int64_t threads = smaller(a.threads, 1 + work / PER_THREAD);
    const bool by_pixels = pixels >= threads * CHUNK || panels < threads;
    const int64_t groups = by_pixels ? 1 : threads;
    const int64_t share = by_pixels ? ratio_up(pixels, threads) : pixels;
    const int64_t chunks = ratio_up(share, CHUNK) * (by_pixels ? threads : 1);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t task = 0; task < chunks * groups; ++task) {
        const int64_t chunk = task / groups, group = task % groups;
        convolve_chunk(a, pixels * chunk / chunks, pixels * (chunk + 1) / chunks, panels * group / groups,
                       panels * (group + 1) / groups);
    }
}

}  // namespace fastldm::FASTLDM_ISA
