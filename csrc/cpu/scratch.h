#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace wavprune {

// Uninitialized values, aligned to 64 bytes for the widest registers.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t values)
      : data_(static_cast<T*>(operator new[](values * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace wavprune
