// Flash attention (Dao et al. 2022, arXiv:2205.14135): tiles of queries against blocks of keys, the softmax kept up to
// date block by block (Milakov & Gimelshein 2018, arXiv:1805.02867).
//
// Queries lie across the lanes of vectors, in the scores [keys, tile] as in the sums [head_dim, tile], so that maxima,
// weights and totals need no work across lanes, and both products are the same microkernel: ROWS splatted words of a
// packed panel times VECTORS vectors, with all ROWS x VECTORS sums in registers. A word is 32 bits: a float, or a pair
// of bfloat16 that the processor multiplies and adds at once. Keys and values are packed once for each head, a group of
// heads at a time; one query's result depends neither on the threads nor on other rows.
#include "attention_words.h"
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

constexpr int ROWS = LANES == 16 ? 8 : 4;  // of sums: with VECTORS, what the registers hold
constexpr int VECTORS = 3;
constexpr int64_t TILE = VECTORS * LANES;  // queries
constexpr int64_t KEYS = Attention::KEYS;
constexpr int64_t WORK =
    Attention::HEAD_DIM * TILE;  // words: one tile of the largest head, or several of a smaller one
constexpr int64_t MOST_TILES = 8;

FASTLDM_INLINE int at_most(int64_t value, int most) { return value < most ? static_cast<int>(value) : most; }

typedef float PanelRow __attribute__((vector_size(4 * ROWS)));

template <int... J>
FASTLDM_INLINE void store_in_panels(float* to, int64_t panel, Floats values, Indices<J...>) {
    const PanelRow low = __builtin_shufflevector(values, values, J...);
    std::memcpy(to, &low, sizeof low);
    if constexpr (LANES == 2 * ROWS) {
        const PanelRow high = __builtin_shufflevector(values, values, ROWS + J...);
        std::memcpy(to + panel, &high, sizeof high);
    }
}

// LANES / ROWS panels side by side, one or two: each takes ROWS words of the vector.
FASTLDM_INLINE void store_in_panels(float* to, int64_t panel, Floats values) {
    static_assert(LANES == ROWS || LANES == 2 * ROWS);
    store_in_panels(to, panel, values, typename Count<ROWS>::Type());
}

// `count` words of each of `tokens` tokens (both at most LANES, the rest zero), transposed: block[t] is word t of each.
template <typename W>
FASTLDM_INLINE void load_transposed(const typename W::Element* from, int64_t token, int tokens, int count,
                                    Floats (&block)[LANES]) {
    for (int i = 0; i < LANES; ++i) block[i] = i < tokens ? W::load_words(from + i * token, count) : Floats{};
    transpose(block);
}

// Panels of ROWS keys: [keys / ROWS, words of a key, ROWS].
template <typename W>
void pack_keys(const Attention& a, const typename W::Element* k, int64_t keys, float* to) {
    const int64_t depth = a.head_dim / W::SIZE;
    for (int64_t key = 0; key < keys; key += LANES)
        for (int64_t t = 0; t < depth; t += LANES) {
            const int count = at_most(depth - t, LANES);
            Floats block[LANES];
            load_transposed<W>(k + key * a.k.token + t * W::SIZE, a.k.token, at_most(keys - key, LANES), count, block);
            for (int i = 0; i < count; ++i) store_in_panels(to + key * depth + (t + i) * ROWS, depth * ROWS, block[i]);
        }
}

// Words of a column of values, or of weights: the last of them may hold half a pair.
template <typename W>
FASTLDM_INLINE int64_t depth_of(int64_t keys) {
    return (keys + W::SIZE - 1) / W::SIZE;
}

// Panels of ROWS columns: [head_dim / ROWS, words of a column, ROWS].
template <typename W>
void pack_values(const Attention& a, const typename W::Element* v, int64_t keys, float* to) {
    const int64_t depth = depth_of<W>(keys);
    for (int64_t t = 0; t < depth; ++t) {
        const typename W::Element* from = v + t * W::SIZE * a.v.token;
        const bool has_next = t * W::SIZE + 1 < keys;
        for (int64_t c = 0; c < a.head_dim; c += LANES) {
            const int count = at_most(a.head_dim - c, LANES);
            const Floats values = W::load_column(from + c, a.v.token, has_next, count);
            if (count == LANES)
                store_in_panels(to + c * depth + t * ROWS, depth * ROWS, values);
            else
                store(to + c * depth + t * ROWS, count, values);  // head_dim is a multiple of ROWS
        }
    }
}

// sums[i][v] = panel[:, i] . vectors[:, v], the microkernel. (With four steps unrolled it was no faster.)
template <typename W, int V>
FASTLDM_INLINE void multiply(const float* panel, const float* vectors, int64_t depth, Floats (&sums)[ROWS][V]) {
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < V; ++v) sums[i][v] = Floats{};
    for (int64_t t = 0; t < depth; ++t, panel += ROWS, vectors += V * LANES) {
        Floats x[V];
        for (int v = 0; v < V; ++v) x[v] = load(vectors + v * LANES);
        for (int i = 0; i < ROWS; ++i) {
            const Floats factor = splat(panel[i]);
            for (int v = 0; v < V; ++v) sums[i][v] = W::multiply_add(factor, x[v], sums[i][v]);
        }
    }
}

// A tile of queries: up to V vectors of them, what has been summed over the keys so far, and softmax's denominator.
struct Tile {
    float* queries;  // [words of a query, V, LANES]
    float* sums;     // [head_dim, V, LANES]
    float highest[TILE], total[TILE];
    int64_t first;  // query
};

// A block of keys, packed.
struct Block {
    const float *keys, *values;
    int64_t first, count;
};

template <typename W, int V>
void begin(const Attention& a, const typename W::Element* q, Tile& tile) {
    const int64_t depth = a.head_dim / W::SIZE;
    for (int v = 0; v < V; ++v) {
        const int64_t query = tile.first + v * LANES;
        for (int64_t t = 0; t < depth; t += LANES) {
            const int count = at_most(depth - t, LANES);
            Floats block[LANES];
            load_transposed<W>(q + query * a.q.token + t * W::SIZE, a.q.token, at_most(a.queries - query, LANES), count,
                               block);
            for (int i = 0; i < count; ++i) store(tile.queries + ((t + i) * V + v) * LANES, block[i]);
        }
        store(tile.highest + v * LANES, splat(-__builtin_inff()));
        store(tile.total + v * LANES, Floats{});
    }
}

// Takes the first `count` keys of a block into account.
template <typename W, int V>
__attribute__((noinline)) void advance(const Attention& a, Tile& tile, const Block& block, int64_t count) {
    using E = typename W::Element;
    alignas(64) float scores[KEYS * V * LANES];
    const int64_t depth = a.head_dim / W::SIZE;
    const bool masks = a.causal && block.first + count > tile.first + 1;
    Ints query{};  // from the tile's first
    for (int lane = 0; lane < LANES; ++lane) query[lane] = lane;
    Floats highest[V], scale[V], total[V] = {};
    for (int v = 0; v < V; ++v) highest[v] = load(tile.highest + v * LANES);
    const auto keep = [&](int64_t key, int v, Floats score) __attribute__((always_inline)) {
        highest[v] = larger(score, highest[v]);
        store(scores + (key * V + v) * LANES, score);
    };

    for (int64_t key = 0; key < count; key += ROWS) {
        Floats sums[ROWS][V];
        multiply<W, V>(block.keys + key * depth, tile.queries, depth, sums);
        if (!masks && key + ROWS <= count) {  // the sums stay in registers
            for (int i = 0; i < ROWS; ++i)
                for (int v = 0; v < V; ++v) keep(key + i, v, sums[i][v]);
            continue;
        }
        float at_rest[ROWS][V][LANES];
        std::memcpy(at_rest, sums, sizeof at_rest);
        for (int i = 0; i < ROWS && key + i < count; ++i)
            for (int v = 0; v < V; ++v) {
                const auto its_own = static_cast<int32_t>(block.first + key + i - tile.first) - v * LANES;
                const Floats score = load(at_rest[i][v]);
                keep(key + i, v, masks ? (query < its_own ? splat(-__builtin_inff()) : score) : score);
            }
    }
    for (int v = 0; v < V; ++v) {
        scale[v] = exp2_to_one<E>((load(tile.highest + v * LANES) - highest[v]) * a.scale);
        store(tile.highest + v * LANES, highest[v]);
        highest[v] *= a.scale;
    }

    const int64_t weights = depth_of<W>(count);
    for (int64_t t = 0; t < weights; ++t)
        for (int v = 0; v < V; ++v) {
            const auto weight = [&](int64_t key) __attribute__((always_inline)) {
                return exp2_to_one<E>(load(scores + (key * V + v) * LANES) * a.scale - highest[v]);
            };
            const bool whole = W::SIZE == 2 && t * 2 + 1 < count;
            const Floats even = weight(t * W::SIZE), odd = whole ? weight(t * 2 + 1) : Floats{};
            total[v] += W::SIZE == 2 ? even + odd : even;
            store(scores + (t * V + v) * LANES, W::weights(even, odd));
        }
    for (int v = 0; v < V; ++v) store(tile.total + v * LANES, load(tile.total + v * LANES) * scale[v] + total[v]);

    const int64_t panel = depth_of<W>(block.count);
    const bool begins = block.first == 0;
    for (int64_t c = 0; c < a.head_dim; c += ROWS) {
        Floats sums[ROWS][V];
        float* const to = tile.sums + c * V * LANES;
        multiply<W, V>(block.values + c * panel, scores, weights, sums);
        if (begins)
            for (int i = 0; i < ROWS; ++i)
                for (int v = 0; v < V; ++v) store(to + (i * V + v) * LANES, sums[i][v]);
        else
            for (int i = 0; i < ROWS; ++i)
                for (int v = 0; v < V; ++v) {
                    float* const so_far = to + (i * V + v) * LANES;
                    store(so_far, load(so_far) * scale[v] + sums[i][v]);
                }
    }
}

template <int V, typename E>
void finish(const Attention& a, E* result, const Tile& tile) {
    for (int v = 0; v < V; ++v) {
        const int64_t query = tile.first + v * LANES;
        const int queries = at_most(a.queries - query, LANES);
        const Floats total = load(tile.total + v * LANES);
        const Floats share = total == 0.0f ? Floats{} : 1.0f / total;
        for (int64_t c = 0; c < a.head_dim; c += LANES) {
            const int count = at_most(a.head_dim - c, LANES);
            Floats block[LANES];
            for (int i = 0; i < LANES; ++i)
                block[i] = i < count ? load(tile.sums + ((c + i) * V + v) * LANES) * share : Floats{};
            transpose(block);
            for (int i = 0; i < queries; ++i) {
                E* to = result + (query + i) * a.result.token + c;
                if (count == LANES)
                    store(to, block[i]);
                else
                    store(to, count, block[i]);
            }
        }
    }
}

template <int V>
struct Vectors {
    static constexpr int COUNT = V;
};

// Calls the function with as many vectors as the tile has queries for.
template <typename F>
FASTLDM_INLINE void with_vectors(const Attention& a, const Tile& tile, const F& function) {
    const int64_t left = a.queries - tile.first;
    if (left > 2 * LANES)
        function(Vectors<3>());
    else if (left > LANES)
        function(Vectors<2>());
    else
        function(Vectors<1>());
}

// One head, and where its keys and values are packed.
template <typename W>
struct Head {
    using E = typename W::Element;
    const E *q, *k, *v;
    E* result;
    int64_t keys;
    float *packed_keys, *packed_values;

    Head(const Attention& a, int64_t index, int64_t place) {
        const int64_t row = index / a.heads, head = index % a.heads;
        const auto at = [&](const Heads& x) { return static_cast<E*>(x.data) + row * x.row + head * x.head; };
        q = at(a.q), k = at(a.k), v = at(a.v), result = at(a.result);
        const int64_t length = a.key_lengths ? a.key_lengths[row] : a.keys;
        keys = length < 0 ? 0 : length < a.keys ? length : a.keys;
        packed_keys = a.packed + place * a.packed_size(), packed_values = packed_keys + a.packed_size() / 2;
    }

    Block block(const Attention& a, int64_t first) const {
        const int64_t left = keys - first, offset = first * (a.head_dim / W::SIZE);
        return {packed_keys + offset, packed_values + offset, first, left < KEYS ? left : KEYS};
    }
};

template <typename W>
void pack(const Attention& a, const Head<W>& head, int64_t first) {
    if (first >= head.keys) return;
    const int64_t left = head.keys - first, keys = left < KEYS ? left : KEYS;
    const int64_t offset = first * (a.head_dim / W::SIZE);
    pack_keys<W>(a, head.k + first * a.k.token, keys, head.packed_keys + offset);
    pack_values<W>(a, head.v + first * a.v.token, keys, head.packed_values + offset);
}

template <typename W>
void attend(const Attention& a, const Head<W>& head, int64_t first, int64_t queries) {
    alignas(64) float words_of_queries[WORK], sums[WORK];
    Tile tiles[MOST_TILES];
    const int64_t left = a.queries - first;
    const int64_t count = ((left < queries ? left : queries) + TILE - 1) / TILE;
    for (int64_t i = 0; i < count; ++i) {
        Tile& tile = tiles[i];
        tile.queries = words_of_queries + i * TILE * a.head_dim, tile.sums = sums + i * TILE * a.head_dim;
        tile.first = first + i * TILE;
        with_vectors(a, tile, [&](auto vectors) { begin<W, vectors.COUNT>(a, head.q, tile); });
    }
    if (head.keys == 0) std::memset(sums, 0, sizeof sums);  // no keys at all give zero, as in PyTorch
    for (int64_t key = 0; key < head.keys; key += KEYS) {
        const Block block = head.block(a, key);
        for (int64_t i = 0; i < count; ++i) {
            Tile& tile = tiles[i];
            const int64_t seen = a.causal ? tile.first + TILE - key : block.count;
            const int64_t keys = seen < block.count ? seen : block.count;
            if (keys > 0) with_vectors(a, tile, [&](auto vectors) { advance<W, vectors.COUNT>(a, tile, block, keys); });
        }
    }
    for (int64_t i = 0; i < count; ++i)
        with_vectors(a, tiles[i], [&](auto vectors) { finish<vectors.COUNT>(a, head.result, tiles[i]); });
}

template <typename W>
void run(const Attention& a) {
    const int64_t heads = a.rows * a.heads, blocks = (a.keys + KEYS - 1) / KEYS;
    const int64_t tiles = (a.queries + TILE - 1) / TILE;
    // Tiles of a task share what they read of a block; but no thread should be left without a task.
    const int64_t fit = Attention::HEAD_DIM / a.head_dim < MOST_TILES ? Attention::HEAD_DIM / a.head_dim : MOST_TILES;
    const int64_t fair = (a.group * tiles + a.threads - 1) / a.threads, queries = (fair < fit ? fair : fit) * TILE;
    const int64_t runs = (a.queries + queries - 1) / queries;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    for (int64_t first = 0; first < heads; first += a.group) {
        const int64_t count = heads - first < a.group ? heads - first : a.group;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < count * blocks; ++task)
            pack(a, Head<W>(a, first + task / blocks, task / blocks), task % blocks * KEYS);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * runs; ++task)
            attend(a, Head<W>(a, first + task / runs, task / runs), task % runs * queries, queries);
    }
}

}  // namespace

void attention(const Attention& a) {
    if (a.type == Type::float32)
        run<Single<float>>(a);
    else if (a.pairs)
        run<Pair>(a);
    else
        run<Single<bfloat16>>(a);
}

}  // namespace fastldm::FASTLDM_ISA
