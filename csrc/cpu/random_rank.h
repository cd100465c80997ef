// From a coarse random rank, by which selection finds its place, to the exact one.
#pragma once

#include "select.h"

namespace wavprune {

// The random rank at a position, 0 the smallest, where its coarse rank is known. 0 stays 0,
// and NaN stays NaN.
template <class T>
double exact_random_rank(const Job<T>& job, int64_t position, T coarse);

}  // namespace wavprune
