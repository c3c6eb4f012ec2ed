#include "layout.h"

#include <cstring>

namespace halfweight {

const char* parse(const uint8_t* blob, size_t bytes, Weight* w) {
  Header h;
  if (bytes < sizeof h) return "the prepared weight is shorter than its header";
  std::memcpy(&h, blob, sizeof h);
  if (h.magic != kMagic || h.version != 1) return "not a prepared weight of this version; prepare it again";
  if (h.format < Format::sparse24_int4 || h.format > Format::dense) return "the prepared weight has an unknown format";
  if (h.half != Half::bf16 && h.half != Half::fp16) return "the prepared weight has an unknown scale dtype";
  if (h.out_features < 0 || h.in_features < 1 || h.in_padded < h.in_features || h.in_padded % kChunk != 0 ||
      h.in_padded > (1 << 24) || h.out_features > (1 << 28) || h.segment < 0)
    return "the prepared weight has impossible sizes";
  if (h.group < 0 || h.group % kChunk != 0 || h.group > 16384 || (h.group == 0 && h.in_padded % 64 != 0) || (h.group > 0 && h.in_padded % h.group != 0))
    return "the prepared weight has an impossible group size";
  w->format = h.format, w->half = h.half, w->segment = h.segment;
  w->out_features = h.out_features, w->in_features = h.in_features, w->in_padded = h.in_padded;
  w->blocks = (h.out_features + kRows - 1) / kRows;
  w->group = h.group > 0 ? h.group : kChannelGroup;
  w->groups = (h.in_padded + w->group - 1) / w->group;
  w->scale_stride = h.group > 0 ? kRows : 0;
  const size_t scales = is_quantised(h.format) ? (h.group > 0 ? static_cast<size_t>(h.in_padded / h.group) : 1) : 0;
  w->scale_bytes = (scales * kRows * 2 + 63) / 64 * 64;
  w->block_bytes = w->scale_bytes + chunk_bytes(h.format) * static_cast<size_t>(h.in_padded / kChunk);
  w->data = blob + sizeof h;
  const size_t needed = sizeof h + w->block_bytes * static_cast<size_t>(w->blocks);
  // Up to out_features - 1 bytes of padding make it a matrix with out_features rows.
  if (bytes < needed || bytes - needed >= static_cast<size_t>(h.out_features > 0 ? h.out_features : 1))
    return "the prepared weight has the wrong length";
  return nullptr;
}

}  // namespace halfweight
