// A vector of LANES floats, on the vector extensions of GCC and Clang.
//
// Every kernel is written once over this header and compiled once for each instruction set, with that set's flags and
//   FASTLDM_ISA    name of the namespace: plain, avx2, avx512, avx512_bf16
//   FASTLDM_LANES  floats in a vector: 4, 8, 16, 16
// No standard template may be used here or in a kernel: its instances would be weak symbols, and the linker is free to
// give the AVX-512 copy to the plain path.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define FASTLDM_INLINE static inline __attribute__((always_inline))

namespace fastldm::FASTLDM_ISA {

constexpr int LANES = FASTLDM_LANES;

typedef float Floats __attribute__((vector_size(4 * FASTLDM_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * FASTLDM_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * FASTLDM_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * FASTLDM_LANES)));

struct bfloat16 {
    uint16_t bits;
};

FASTLDM_INLINE Floats splat(float value) { return value - Floats{}; }

#if FASTLDM_LANES == 8 && defined(__AVX2__)
// GCC 12 makes six instructions of the conversion of eight halves, and too many of the way back.
FASTLDM_INLINE Words extend(Halves halves) {
    return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
}
FASTLDM_INLINE __m256i truncate(Words low, Words high) {  // words < 2^16
    const __m256i mixed = _mm256_packus_epi32(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high));
    return _mm256_permute4x64_epi64(mixed, 0xd8);
}
FASTLDM_INLINE Halves truncate(Words words) {
    return reinterpret_cast<Halves>(_mm256_castsi256_si128(truncate(words, words)));
}
#elif defined(__AVX512F__)
// As poorly made by GCC 12.
FASTLDM_INLINE Words extend(Halves halves) {
    return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
}
FASTLDM_INLINE Halves truncate(Words words) {
    return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
}
#else
FASTLDM_INLINE Words extend(Halves halves) { return __builtin_convertvector(halves, Words); }
FASTLDM_INLINE Halves truncate(Words words) { return __builtin_convertvector(words, Halves); }
#endif

FASTLDM_INLINE Floats widen(Halves halves) { return reinterpret_cast<Floats>(extend(halves) << 16); }

// The upper halves, rounded to nearest even; any NaN becomes the quiet NaN that PyTorch writes.
FASTLDM_INLINE Words rounded(Floats values) {
    const Words bits = reinterpret_cast<Words>(values);
    const Words quiet = Words{} + 0x7fc0;
    return values == values ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : quiet;
}

FASTLDM_INLINE Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

FASTLDM_INLINE Floats load(const bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen(halves);
}

// Two vectors of neighbours in memory, in an order that costs the least: bfloat16's even ones, then the odd ones.
FASTLDM_INLINE void load_mixed(const float* from, Floats& one, Floats& other) {
    one = load(from);
    other = load(from + LANES);
}

FASTLDM_INLINE void load_mixed(const bfloat16* from, Floats& one, Floats& other) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    one = reinterpret_cast<Floats>(pairs << 16);
    other = reinterpret_cast<Floats>(pairs & 0xffff0000u);
}

FASTLDM_INLINE void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

template <int N, typename T>
FASTLDM_INLINE void prefetch(const T* from) {
    for (int i = 0; i < N; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

FASTLDM_INLINE Halves narrow(Floats values) {
#ifdef __AVX512BF16__  // rounds alike, but for numbers below 1.2e-38, which become 0
    return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(values));
#else
    return truncate(rounded(values));
#endif
}

FASTLDM_INLINE void store(bfloat16* to, Floats values) {
    const Halves halves = narrow(values);
    std::memcpy(to, &halves, sizeof halves);
}

// Two vectors, one after the other.
template <typename T>
FASTLDM_INLINE void store(T* to, Floats low, Floats high) {
    store(to, low);
    store(to + LANES, high);
}

#if FASTLDM_LANES == 8 && defined(__AVX2__)
FASTLDM_INLINE void store(bfloat16* to, Floats low, Floats high) {
    const __m256i halves = truncate(rounded(low), rounded(high));
    std::memcpy(to, &halves, sizeof halves);
}
#elif defined(__AVX512BF16__)
FASTLDM_INLINE void store(bfloat16* to, Floats low, Floats high) {
    const __m512bh halves = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(to, &halves, sizeof halves);
}
#endif

// The same past the caches, where the set can: nothing is read before it is written. `to` is a multiple of 64 bytes.
template <typename T>
FASTLDM_INLINE void stream(T* to, Floats low, Floats high) {
#ifdef __AVX512F__
    __m512i lines[2 * LANES * sizeof(T) / 64];
    store(reinterpret_cast<T*>(lines), low, high);
    for (const __m512i& line : lines) _mm512_stream_si512(reinterpret_cast<__m512i*>(to) + (&line - lines), line);
#else
    store(to, low, high);
#endif
}

// Stands after the last `stream` of a task: other threads see it all.
FASTLDM_INLINE void end_of_stream() {
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

// The first `count` lanes, `stride` elements apart in memory; the others read as zero and are not written. One lane is
// computed exactly as a lane of a full vector, so results depend neither on a tensor's size nor on its layout.
template <typename T>
FASTLDM_INLINE Floats load(const T* from, int64_t stride, int count) {
    T lanes[LANES] = {};
    for (int i = 0; i < count; ++i) lanes[i] = from[i * stride];
    return load(lanes);
}

template <typename T>
FASTLDM_INLINE void store(T* to, int64_t stride, int count, Floats values) {
    T lanes[LANES];
    store(lanes, values);
    for (int i = 0; i < count; ++i) to[i * stride] = lanes[i];
}

// The first `count` lanes of neighbours in memory; the others read as zero and are not written.
#ifdef __AVX512BW__
FASTLDM_INLINE uint32_t first_lanes(int count) { return (1u << count) - 1; }

FASTLDM_INLINE Floats load(const float* from, int count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(count)), from);
}
FASTLDM_INLINE Halves load_halves(const bfloat16* from, int count) {
    return reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(count)), from));
}
FASTLDM_INLINE void store(float* to, int count, Floats values) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first_lanes(count)), values);
}
FASTLDM_INLINE void store(bfloat16* to, int count, Floats values) {
    const Halves halves = narrow(values);
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(first_lanes(count)), reinterpret_cast<__m256i>(halves));
}
#else
FASTLDM_INLINE Floats load(const float* from, int count) { return load(from, 1, count); }
FASTLDM_INLINE Halves load_halves(const bfloat16* from, int count) {
    Halves halves{};
    std::memcpy(&halves, from, static_cast<size_t>(count) * sizeof *from);
    return halves;
}
template <typename T>
FASTLDM_INLINE void store(T* to, int count, Floats values) {
    store(to, 1, count, values);
}
#endif
FASTLDM_INLINE Floats load(const bfloat16* from, int count) { return widen(load_halves(from, count)); }

// NaN in `value` stays NaN, as in torch.clamp.
FASTLDM_INLINE Floats clamp(Floats value, Floats low, Floats high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

template <int... J>
struct Indices {};
template <int N, int... J>
struct Count : Count<N - 1, N - 1, J...> {};
template <int... J>
struct Count<0, J...> {
    using Type = Indices<J...>;
};

// What load_mixed mixed, in the order of memory.
template <int... J>
FASTLDM_INLINE void interleave(Floats& even, Floats& odd, Indices<J...>) {
    const Floats low = __builtin_shufflevector(even, odd, (J / 2 + J % 2 * LANES)...);
    odd = __builtin_shufflevector(even, odd, ((J + LANES) / 2 + J % 2 * LANES)...);
    even = low;
}

template <typename E>
FASTLDM_INLINE void unmix(Floats& one, Floats& other) {
    if (sizeof(E) == 2) interleave(one, other, typename Count<LANES>::Type());
}

// Swaps, in blocks of 2 HALF x 2 HALF, the upper right quarter with the lower left one, for ever larger blocks.
template <int HALF, int... J>
FASTLDM_INLINE void transpose(Floats (&rows)[LANES], Indices<J...> lanes) {
    for (int i = 0; i < LANES; ++i)
        if (!(i & HALF)) {
            const Floats upper = rows[i], lower = rows[i + HALF];
            rows[i] = __builtin_shufflevector(upper, lower, (J & HALF ? LANES + J - HALF : J)...);
            rows[i + HALF] = __builtin_shufflevector(upper, lower, (J & HALF ? LANES + J : J + HALF)...);
        }
    if constexpr (2 * HALF < LANES) transpose<2 * HALF>(rows, lanes);
}

// LANES rows of LANES lanes: lane j of row i becomes lane i of row j.
FASTLDM_INLINE void transpose(Floats (&rows)[LANES]) { transpose<1>(rows, typename Count<LANES>::Type()); }

// b where one of the two is NaN.
FASTLDM_INLINE Floats larger(Floats a, Floats b) {
#if FASTLDM_LANES == 8 && defined(__AVX2__)  // GCC 12 makes two instructions of the comparison
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// b where one of the two is NaN.
FASTLDM_INLINE Floats smaller(Floats a, Floats b) {
#ifdef __AVX512F__  // GCC 12 makes two instructions of the comparison
    return _mm512_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

// exp(z) for -87 <= z <= 88; other z give any number. With z = n ln2 + r, exp(z) = 2^n p(r), where p is the minimax
// polynomial over |r| <= ln2/2. For results of type float, degree 6: its error, 3.1e-9, leaves only rounding, and ln2
// is in two parts, so that n times the first is exact without a fused multiply-add. For bfloat16, degree 4: 5.4e-6.
template <typename E>
FASTLDM_INLINE Floats exp_in_range(Floats z) {
    const Floats to_integer = splat(12582912.0f);  // 1.5 * 2^23: the low bits of a sum with it hold the integer
    const Floats shifted = z * 1.44269504f + to_integer;
    const Floats n = shifted - to_integer;
    Floats p;
    if (sizeof(E) == sizeof(float)) {
        const Floats r = z - n * 0.693359375f + n * 2.12194440e-4f;
        const Floats r2 = r * r;  // pairs of terms at a time, for a short chain of dependent operations
        const Floats high = (r * 0x1.6a23d0p-10f + 0x1.123a20p-7f) * r2 + (r * 0x1.5558f2p-5f + 0x1.555492p-3f);
        p = (high * r2 + (r * 0x1.fffffcp-2f + 1.0f)) * r + 1.0f;
    } else {
        const Floats r = z - n * 0.693147182f;
        p = ((r * 0x1.5224eap-5f + 0x1.571d1ep-3f) * (r * r) + (r * 0x1.0006b8p-1f + 1.0f)) * r + 1.0f;
    }
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23));
}

// a / b, to be stored as E, for b >= 1. For bfloat16, AVX-512's reciprocal to 14 bits is enough.
template <typename E>
FASTLDM_INLINE Floats quotient(Floats a, Floats b) {
#ifdef __AVX512F__
    if (sizeof(E) == 2) return a * Floats(_mm512_rcp14_ps(b));
#endif
    return a / b;
}

// 2^r for |r| <= 1/2, to be stored as bfloat16: the minimax polynomial, whose error, 1.0e-4, is a twentieth of what
// rounding to bfloat16 costs.
FASTLDM_INLINE Floats exp2_fraction(Floats r) {
    return ((r * 0x1.c2a222p-5f + 0x1.f00c54p-3f) * r + 0x1.62f5fap-1f) * r + 1.0f;
}

#ifdef __AVX512F__
// exp(-x factor), to be stored as E, for a factor that is a power of two; 0 or infinite where its exponent has no room.
// With the argument times log2(e) = n + r, 2^n is by scaling. For bfloat16, n is an integer. For float it is in
// sixteenths, the power of its fraction from a table, and the minimax polynomial for 2^r, with |r| <= 1/32, has an
// error of 1.6e-9, which leaves only rounding; the argument must be at most 2^17 there.
template <typename E>
FASTLDM_INLINE Floats exp_of_minus(Floats x, float factor = 1.0f) {
    if (sizeof(E) == 2) {
        const Floats z = x * (-1.44269504f * factor);
        const Floats n = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_scalef_ps(exp2_fraction(z - n), n);
    }
    alignas(64) static constexpr float sixteenths[] = {// 2^(i / 16)
                                                       0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f,
                                                       0x1.306fe0p+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f,
                                                       0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
                                                       0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};
    const float log2e = -1.44269502f * factor, rest = -1.92596299e-8f * factor;
    const Floats to_sixteenths = splat(786432.0f);  // 1.5 * 2^19: the low bits of a sum with it hold 16 n
    const Floats shifted = x * log2e + to_sixteenths, n = shifted - to_sixteenths;
    const Floats r = (x * log2e - n) + x * rest;
    const Floats root = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(shifted), load(sixteenths));
    const Floats growth = ((r * 0x1.c6ac6ap-5f + 0x1.ebfff4p-3f) * r + 0x1.62e430p-1f) * r;
    return _mm512_scalef_ps(root * growth + root, n);
}
#endif

// x / (1 + exp(-x)), to be stored as E; -0 below -87, where the value is under 2e-36.
template <typename E>
FASTLDM_INLINE Floats silu(Floats x) {
#ifdef __AVX512F__
    Floats bounded = x;  // NaN stays NaN
    if (sizeof(E) == 4) bounded = _mm512_max_ps(splat(-110.0f), _mm512_min_ps(splat(110.0f), x));
    return quotient<E>(x, 1.0f + exp_of_minus<E>(bounded));
#else
    // Above 87, exp(-x) no longer counts. As integers, floats compare like floats as long as one is positive.
    const Ints bits = reinterpret_cast<Ints>(x), most = reinterpret_cast<Ints>(splat(87.0f));
    const Floats bounded = reinterpret_cast<Floats>(bits < most ? bits : most);
    const Floats value = quotient<E>(x, 1.0f + exp_in_range<E>(-bounded));
    return x < splat(-87.0f) ? x * 0.0f : value;
#endif
}

}  // namespace fastldm::FASTLDM_ISA
