// The kernel layout of a weight: one blob of bytes, written by ../layout.py and read here.
//
//   header (64 bytes) | row block 0 | row block 1 | ... | padding, so that out_features divides the length
//   row block (16 rows) = scales [groups][16] (2 bytes each, padded to 64 bytes) | chunk 0 | chunk 1 | ...
//   chunk = 16 rows x 32 columns, `chunk_bytes(format)` bytes, made of 64-byte vectors whose 32-bit lane r belongs to row r.
//
// A row block is one sequential stream, so a thread that owns a range of rows reads one range of memory.
// quad = 4 consecutive columns; q = quad in the chunk (0..7); c = q & 3 is the byte of the lane, h = 0, 1 the kept slot.
//
//   meta vector (all sparse formats)   lane byte c = nibble(quad c) | nibble(quad c + 4) << 4, nibble = i0 | i1 << 2
//   sparse24_int4   meta, W[0], W[1]            W[q / 4] lane byte c = first kept | second kept << 4 (two's complement nibbles)
//   sparse24_int8   meta, U[0][0], U[0][1], U[1][0], U[1][1]      U[q / 4][h] lane byte c = kept value h of quad q
//   sparse24        meta, P[0] ... P[7]         P[q] lane = (first kept, second kept), 2 bytes each
//   int4            W[0] ... W[3]               W[i] lane byte c = column 8i + c | column 8i + 4 + c << 4 (two's complement)
//   int8            U[0] ... U[7]               U[i] lane byte c = column 4i + c
//   dense           P[0] ... P[15]              P[i] lane = (column 2i, column 2i + 1), 2 bytes each
#pragma once
#include <cstddef>
#include <cstdint>

// Translation units of different instruction sets share these headers: nothing of them may be merged by the linker.
#define HW_INLINE inline __attribute__((always_inline))

namespace halfweight {

constexpr int kRows = 16;
constexpr int kChunk = 32;
constexpr int kHeaderBytes = 64;
constexpr int kChannelGroup = 128;  // activations are quantised in groups of this size when the weight has one scale per row
constexpr uint32_t kMagic = 0x32347768;  // "hw42"

enum class Format : int32_t { sparse24_int4 = 0, sparse24_int8 = 1, sparse24 = 2, int4 = 3, int8 = 4, dense = 5 };
enum class Half : int32_t { bf16 = 0, fp16 = 1 };

struct Header {
  uint32_t magic, version;
  Format format;
  Half half;  // dtype of the scales, or of the weights where there are none
  int32_t out_features, in_features, in_padded;
  int32_t group;    // columns per scale; 0: one scale per row
  int32_t segment;  // of a low-rank branch: its input is the sums of this many consecutive activations; else 0
  int32_t unused[7];
};
static_assert(sizeof(Header) == kHeaderBytes, "the header is 64 bytes");

HW_INLINE constexpr bool is_quantised(Format f) { return f != Format::sparse24 && f != Format::dense; }
HW_INLINE constexpr bool is_int4(Format f) { return f == Format::sparse24_int4 || f == Format::int4; }
HW_INLINE constexpr bool is_sparse(Format f) { return f <= Format::sparse24; }

HW_INLINE constexpr size_t chunk_bytes(Format f) {
  switch (f) {
    case Format::sparse24_int4: return 64 * 3;
    case Format::sparse24_int8: return 64 * 5;
    case Format::sparse24: return 64 * 9;
    case Format::int4: return 64 * 4;
    case Format::int8: return 64 * 8;
    case Format::dense: return 64 * 16;
  }
  return 0;
}

// A parsed blob.
struct Weight {
  Format format;
  Half half;
  int out_features, in_features, in_padded, blocks, segment;
  int group;         // activations per quantisation group
  int groups;        // such groups in a row (the last may be shorter)
  int scale_stride;  // scales to skip from one group to the next: 16, or 0 for one scale per row
  const uint8_t* data;
  size_t block_bytes, scale_bytes;

  HW_INLINE const uint16_t* scales(int block) const { return reinterpret_cast<const uint16_t*>(data + block * block_bytes); }
  HW_INLINE const uint8_t* chunks(int block) const { return data + block * block_bytes + scale_bytes; }
  HW_INLINE int group_end(int g) const {  // in chunks
    const int end = (g + 1) * group;
    return (end < in_padded ? end : in_padded) / kChunk;
  }
};

// nullptr, or what is wrong with the blob. Every size is checked, so a damaged blob is never read out of bounds.
const char* parse(const uint8_t* blob, size_t bytes, Weight* weight);

}  // namespace halfweight
