// Four channels-last maps woven into one of twice the height and width; pixels are copied whole, whatever they hold.
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

void interleave(const Interleave& a) {
    const int64_t line = a.width * a.bytes;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t row = 0; row < 2 * a.rows; ++row) {
        const char* left = static_cast<const char*>(a.phases[row % 2][0]) + row / 2 * line;
        const char* right = static_cast<const char*>(a.phases[row % 2][1]) + row / 2 * line;
        char* to = static_cast<char*>(a.result) + row * 2 * line;
        for (int64_t offset = 0; offset < line; offset += a.bytes, to += 2 * a.bytes) {
            std::memcpy(to, left + offset, static_cast<size_t>(a.bytes));
            std::memcpy(to + a.bytes, right + offset, static_cast<size_t>(a.bytes));
        }
    }
}

}  // namespace fastldm::FASTLDM_ISA
