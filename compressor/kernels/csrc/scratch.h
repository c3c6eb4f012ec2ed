#pragma once
#include <cstdint>
#include <cstdlib>

#include "torch_shim.h"

namespace halfweight {

// Working memory of the calling thread: grows, is reused by every call, and is 64-byte aligned.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  char* get(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      memory_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (memory_ == nullptr) {
        size_ = 0;
        fail("out of memory: %zu bytes of working memory for the kernels", bytes);
      }
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace halfweight
