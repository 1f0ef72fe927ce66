// What attention multiplies, in words of 32 bits, and the power of two in its softmax.
#pragma once

#include "vector.h"

namespace fastldm::FASTLDM_ISA {

// 2^x for x <= 0, exactly 0 far below: with x = n + r, 2^n p(r), where p is the minimax polynomial over |r| <= 1/2. Its
// error for results of type float is 1.1e-7.
template <typename E>
FASTLDM_INLINE Floats exp2_to_one(Floats x) {
#ifdef __AVX512F__
    const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
#else
    const Floats to_integer =
        splat(12582912.0f + 127.0f);  // 1.5 * 2^23: the low bits hold n + 127, the exponent of 2^n
    const Floats bounded = larger(splat(-127.0f), x);
    const Floats shifted = bounded + to_integer, r = bounded - (shifted - to_integer);
#endif
    Floats p;
    if (sizeof(E) == sizeof(float)) {
        const Floats r2 = r * r,
                     high = (r * 0x1.5bb9aap-10f + 0x1.3cea88p-7f) * r2 + (r * 0x1.c6b754p-5f + 0x1.ebf9bcp-3f);
        p = high * r2 + (r * 0x1.62e42ap-1f + 1.0f);
    } else {
        p = exp2_fraction(r);
    }
#ifdef __AVX512F__
    return _mm512_scalef_ps(p, n);  // 0 where n is -inf, and NaN stays NaN
#else
    return p * reinterpret_cast<Floats>(reinterpret_cast<Ints>(shifted) << 23);  // a product, so that NaN stays NaN
#endif
}

FASTLDM_INLINE Floats words(Words bits) { return reinterpret_cast<Floats>(bits); }

// A word is one element, as a float.
template <typename E>
struct Single {
    using Element = E;
    static constexpr int SIZE = 1;  // elements in a word

    static Floats load_words(const E* from, int count) { return load(from, count); }
    static Floats load_column(const E* from, int64_t, bool, int count) { return load_words(from, count); }
    static Floats weights(Floats even, Floats) { return even; }
    static Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }
};

// A word is two bfloat16, the first in the lower half; the weights too are rounded to bfloat16.
struct Pair {
    using Element = bfloat16;
    static constexpr int SIZE = 2;

    static Floats load_words(const bfloat16* from, int count) {
        return load(reinterpret_cast<const float*>(from), count);
    }
    // Pairs of neighbours in a column: `count` columns of this token and, if there is one, the next.
    static Floats load_column(const bfloat16* from, int64_t token, bool has_next, int count) {
        const Words first = extend(load_halves(from, count));
        return words(has_next ? first | extend(load_halves(from + token, count)) << 16 : first);
    }
#ifdef __AVX512BF16__
    static Floats weights(Floats even, Floats odd) {
        alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even));
        const __m512i mixed = _mm512_permutexvar_epi16(_mm512_load_si512(order), reinterpret_cast<__m512i>(both));
        return reinterpret_cast<Floats>(mixed);
    }
    static Floats multiply_add(Floats a, Floats b, Floats sum) {
        return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                         reinterpret_cast<__m512bh>(b)));
    }
#else  // the same in floats, for tests of everything around it
    static Floats weights(Floats even, Floats odd) { return words(rounded(even) | rounded(odd) << 16); }
    static Floats multiply_add(Floats a, Floats b, Floats sum) {
        const Words x = reinterpret_cast<Words>(a), y = reinterpret_cast<Words>(b);
        return words(x & 0xffff0000) * words(y & 0xffff0000) + (words(x << 16) * words(y << 16) + sum);
    }
#endif
};

}  // namespace fastldm::FASTLDM_ISA
