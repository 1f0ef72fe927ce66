// Mean and deviation of a group, from the moments of its channels.
#pragma once

#include <cstdint>

namespace fastldm::FASTLDM_ISA {

struct GroupStatistics {
    double mean, rstd;  // of x + row_bias
};

// A group's variance is the mean of its channels' own and of the squared distances of their means from the group's.
// The row bias shifts a channel's mean and leaves its variance alone.
template <typename M>
static inline GroupStatistics group_statistics(const M* means, const M* variances, const float* row_bias, int64_t size,
                                               double eps) {
    const auto mean_of = [&](int64_t c) { return means[c] + (row_bias ? static_cast<double>(row_bias[c]) : 0.0); };
    double mean = 0.0, variance = 0.0;
    for (int64_t c = 0; c < size; ++c) mean += mean_of(c);
    mean /= static_cast<double>(size);
    for (int64_t c = 0; c < size; ++c) {
        const double delta = mean_of(c) - mean;
        variance += variances[c] + delta * delta;
    }
    return {mean, 1.0 / __builtin_sqrt(variance / static_cast<double>(size) + eps)};
}

}  // namespace fastldm::FASTLDM_ISA
