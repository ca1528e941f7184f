#include "scan.h"

#include <cstring>

namespace {

constexpr int kMaxScans = 500;
constexpr int kMaxSide = 65500;  // libjpeg's JPEG_MAX_DIMENSION

uint32_t be16(const uint8_t* p) { return uint32_t(p[0]) << 8 | p[1]; }
uint32_t be32(const uint8_t* p) { return be16(p) << 16 | be16(p + 2); }

// EXIF: the orientation in the first image file directory of a TIFF block; 1 where there is none or
// the block is damaged, which is how torchvision and PIL go on too.
int exif_orientation(const uint8_t* tiff, uint64_t size) {
  if (size < 8) return 1;
  const bool little = tiff[0] == 'I';
  if (!(little && tiff[1] == 'I') && !(tiff[0] == 'M' && tiff[1] == 'M')) return 1;
  auto u16 = [&](uint64_t at) -> uint32_t {
    return little ? uint32_t(tiff[at + 1]) << 8 | tiff[at] : be16(tiff + at);
  };
  auto u32 = [&](uint64_t at) -> uint64_t {
    return little ? uint64_t(u16(at + 2)) << 16 | u16(at) : be32(tiff + at);
  };
  if (u16(2) != 42) return 1;
  const uint64_t directory = u32(4);
  if (directory > size - 2) return 1;
  const uint64_t room = (size - directory - 2) / 12;
  const uint64_t stated = u16(directory);
  const uint64_t entries = stated < room ? stated : room;
  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t at = directory + 2 + 12 * i;
    if (u16(at) != 0x0112) continue;
    const uint32_t value = u16(at + 8);
    return u16(at + 2) == 3 && value >= 1 && value <= 8 ? int(value) : 1;
  }
  return 1;
}

// Length of a stretch at p, in whole blocks, that holds no 0xFF but stuffed ones (0xFF 0x00): most of a JPEG.
#if defined(__x86_64__) && defined(__gnu_linux__)
__attribute__((target_clones("avx2", "default")))
#endif
uint64_t bytes_without_marker(const uint8_t* p, uint64_t size) {
  constexpr uint64_t kBlock = 128;
  uint64_t at = 0;
  for (; at + kBlock < size; at += kBlock) {  // the byte behind a block is looked at too
    uint8_t marker = 0;
    for (uint64_t i = 0; i < kBlock; ++i)
      marker |= uint8_t((p[at + i] == 0xFF) & (p[at + i + 1] != 0));
    if (marker) break;
  }
  return at;
}

struct Component {
  int id, h, v, quant;
  bool has_data;  // the scan that carries its DC coefficients was seen
};

class Jpeg {
 public:
  Jpeg(const uint8_t* data, uint64_t size, VqsaScan* out) : data_(data), size_(size), out_(out) {}

  Fault walk() {
    at_ = 2;  // SOI was seen
    for (;;) {
      if (at_ >= size_) return kTruncated;
      if (data_[at_] != 0xFF) return kNoMarker;
      while (at_ < size_ && data_[at_] == 0xFF) ++at_;  // fill bytes are allowed
      if (at_ >= size_) return kTruncated;
      const int marker = data_[at_++];
      if (marker == 0xD9) return end();
      if (marker == 0x00 || (marker >= 0xD0 && marker <= 0xD7)) return kNoMarker;
      const bool has_length = marker >= 0xC0 && marker != 0xD8 && !(marker >= 0xF0 && marker <= 0xFD);
      if (!has_length) return kBadMarker;
      if (size_ - at_ < 2) return kTruncated;
      const uint64_t length = be16(data_ + at_);
      if (length < 2) return kBadSegment;
      if (length > size_ - at_) return kSegmentPastEnd;
      const uint8_t* segment = data_ + at_ + 2;
      at_ += length;
      const Fault fault = take(marker, segment, length - 2);
      if (fault != kSound) return fault;
    }
  }

 private:
  Fault take(int marker, const uint8_t* segment, uint64_t length) {
    switch (marker) {
      case 0xC0: case 0xC1: case 0xC2: return frame(marker, segment, length);
      case 0xC4: return huffman_tables(segment, length);
      case 0xDA: return scan(segment, length);
      case 0xDB: return quant_tables(segment, length);
      case 0xDC: return length == 2 ? kSound : kBadSegment;  // DNL: the frame's height is used
      case 0xDD: return length == 2 ? kSound : kBadSegment;  // DRI
      case 0xE1:
        if (!has_exif_ && length >= 6 && std::memcmp(segment, "Exif\0\0", 6) == 0) {
          has_exif_ = true;
          out_->orientation = exif_orientation(segment + 6, length - 6);
        }
        return kSound;
      default:
        if (marker >= 0xE0 && marker <= 0xEF) return kSound;                // APPn
        if (marker == 0xFE) return kSound;                                  // COM
        if (marker >= 0xC0 && marker <= 0xCF) return kUnsupportedJpeg;      // SOF3.., DAC
        return kBadMarker;
    }
  }

  Fault frame(int marker, const uint8_t* segment, uint64_t length) {
    if (components_ != 0) return kBadMarker;
    if (length < 6) return kBadFrame;
    const int count = segment[5];
    if (length != 6 + 3 * uint64_t(count)) return kBadFrame;
    if (segment[0] != 8) return kUnsupportedJpeg;
    out_->height = int(be16(segment + 1));
    out_->width = int(be16(segment + 3));
    out_->components = count;
    if (out_->height < 1 || out_->width < 1 || out_->height > kMaxSide || out_->width > kMaxSide)
      return kBadSize;
    if (count != 1 && count != 3 && count != 4) return kBadFrame;
    for (int i = 0; i < count; ++i) {
      const uint8_t* c = segment + 6 + 3 * i;
      component_[i] = {c[0], c[1] >> 4, c[1] & 15, c[2], false};
      const Component& now = component_[i];
      if (now.h < 1 || now.h > 4 || now.v < 1 || now.v > 4) return kBadSampling;
      if (now.quant > 3) return kBadFrame;
      for (int k = 0; k < i; ++k)
        if (component_[k].id == now.id) return kBadFrame;
      if (now.h > h_max_) h_max_ = now.h;
      if (now.v > v_max_) v_max_ = now.v;
    }
    for (int i = 0; i < count; ++i)  // libjpeg has no fractional upsampling
      if (h_max_ % component_[i].h || v_max_ % component_[i].v) return kBadSampling;
    components_ = count;
    progressive_ = marker == 0xC2;
    return kSound;
  }

  Fault quant_tables(const uint8_t* p, uint64_t length) {
    while (length > 0) {
      const int wide = p[0] >> 4, id = p[0] & 15;
      const uint64_t need = 1 + 64 * uint64_t(wide + 1);
      if (wide > 1 || id > 3 || length < need) return kBadQuantTable;
      has_quant_[id] = true;
      p += need;
      length -= need;
    }
    return kSound;
  }

  Fault huffman_tables(const uint8_t* p, uint64_t length) {
    while (length > 0) {
      if (length < 17) return kBadHuffmanTable;
      const int is_ac = p[0] >> 4, id = p[0] & 15;
      if (is_ac > 1 || id > 3) return kBadHuffmanTable;
      uint32_t symbols = 0, code = 0;
      for (int bits = 1; bits <= 16; ++bits) {
        symbols += p[bits];
        code += p[bits];
        // The code made of ones alone must stay free, as in libjpeg; a full tree is refused too.
        if (p[bits] != 0 && code >= (1u << bits)) return kBadHuffmanTable;
        code <<= 1;
      }
      if (symbols > 256 || length < 17 + uint64_t(symbols)) return kBadHuffmanTable;
      if (!is_ac)
        for (uint32_t i = 0; i < symbols; ++i)
          if (p[17 + i] > 15) return kBadHuffmanTable;
      (is_ac ? has_ac_ : has_dc_)[id] = true;
      p += 17 + symbols;
      length -= 17 + symbols;
    }
    return kSound;
  }

  Fault scan(const uint8_t* segment, uint64_t length) {
    if (components_ == 0) return kBadMarker;
    if (++scans_ > kMaxScans) return kTooManyScans;
    if (length < 1) return kBadScan;
    const int count = segment[0];
    if (count < 1 || count > components_ || length != 4 + 2 * uint64_t(count)) return kBadScan;
    const uint8_t* spectral = segment + 1 + 2 * count;
    const int first = spectral[0], last = spectral[1], high = spectral[2] >> 4, low = spectral[2] & 15;
    if (progressive_) {
      if (first > last || last > 63 || low > 13) return kBadScan;
      if (first == 0 ? last != 0 : count != 1) return kBadScan;
      if (high != 0 && low != high - 1) return kBadScan;
    }
    const bool needs_dc = !progressive_ || (first == 0 && high == 0);
    const bool needs_ac = !progressive_ || first > 0;
    const bool carries_dc = !progressive_ || first == 0;
    bool taken[4] = {};
    int blocks_in_mcu = 0;
    uint64_t blocks = 0;
    for (int i = 0; i < count; ++i) {
      const int id = segment[1 + 2 * i], dc = segment[2 + 2 * i] >> 4, ac = segment[2 + 2 * i] & 15;
      int k = 0;
      while (k < components_ && component_[k].id != id) ++k;
      if (k == components_ || taken[k] || dc > 3 || ac > 3) return kBadScan;
      taken[k] = true;
      Component& now = component_[k];
      if (!has_quant_[now.quant] || (needs_dc && !has_dc_[dc]) || (needs_ac && !has_ac_[ac]))
        return kMissingTable;
      if (!needs_dc && !now.has_data) return kBadScan;  // refines what was never sent
      if (needs_dc) now.has_data = true;
      blocks_in_mcu += now.h * now.v;
      blocks += blocks_in_scan(now, count > 1);
    }
    if (count > 1 && blocks_in_mcu > 10) return kBadSampling;  // T.81 B.2.3

    const uint64_t start = at_;
    const Fault fault = entropy_coded_data();
    if (fault != kSound) return fault;
    // A block costs at least one bit for DC and, in sequential mode, one for AC. So what a header
    // claims is bounded by the bytes there are, before anyone takes memory for it.
    const uint64_t bits_needed = carries_dc ? blocks * (progressive_ ? 1 : 2) : 1;
    return (at_ - start) * 8 >= bits_needed ? kSound : kTooFewData;
  }

  uint64_t blocks_in_scan(const Component& c, bool interleaved) const {
    const uint64_t width = uint64_t(out_->width), height = uint64_t(out_->height);
    auto up = [](uint64_t a, uint64_t b) { return (a + b - 1) / b; };
    if (interleaved)
      return up(width, 8 * h_max_) * up(height, 8 * v_max_) * c.h * c.v;
    return up(up(width * c.h, h_max_), 8) * up(up(height * c.v, v_max_), 8);
  }

  // Leaves at_ on the 0xFF of the marker that ends the scan.
  Fault entropy_coded_data() {
    while (at_ < size_) {
      at_ += bytes_without_marker(data_ + at_, size_ - at_);
      const void* hit = std::memchr(data_ + at_, 0xFF, size_ - at_);
      if (hit == nullptr) return kTruncated;
      at_ = uint64_t(static_cast<const uint8_t*>(hit) - data_);
      if (size_ - at_ < 2) return kTruncated;
      const int next = data_[at_ + 1];
      if (next == 0x00 || (next >= 0xD0 && next <= 0xD7)) at_ += 2;  // a stuffed byte, a restart
      else if (next == 0xFF) at_ += 1;                               // fill
      else return kSound;
    }
    return kTruncated;
  }

  Fault end() const {
    if (components_ == 0) return kBadFrame;
    for (int i = 0; i < components_; ++i)
      if (!component_[i].has_data) return kMissingScan;
    return kSound;  // bytes after EOI are other people's business
  }

  const uint8_t* data_;
  uint64_t size_;
  VqsaScan* out_;
  uint64_t at_ = 0;
  int components_ = 0, scans_ = 0, h_max_ = 1, v_max_ = 1;
  bool progressive_ = false, has_exif_ = false;
  Component component_[4] = {};
  bool has_quant_[4] = {}, has_dc_[4] = {}, has_ac_[4] = {};
};

struct Crc32 {
  uint32_t table[8][256];
  constexpr Crc32() : table() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; ++i)
      for (int k = 1; k < 8; ++k)
        table[k][i] = table[0][table[k - 1][i] & 255] ^ (table[k - 1][i] >> 8);
  }
  // Eight bytes at a time: PNG's checksum would otherwise dominate the scan.
  uint32_t operator()(const uint8_t* p, uint64_t n) const {
    uint32_t c = 0xFFFFFFFFu;
    for (; n >= 8; p += 8, n -= 8) {
      c ^= uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
      c = table[7][c & 255] ^ table[6][(c >> 8) & 255] ^ table[5][(c >> 16) & 255] ^ table[4][c >> 24] ^
          table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
    }
    for (; n > 0; ++p, --n) c = table[0][(c ^ *p) & 255] ^ (c >> 8);
    return c ^ 0xFFFFFFFFu;
  }
};
constexpr Crc32 kCrc32;

Fault png_header(const uint8_t* p, VqsaScan* out, int* colour, uint64_t* raw_bytes) {
  const uint32_t width = be32(p), height = be32(p + 4);
  const int depth = p[8];
  *colour = p[9];
  if (width < 1 || height < 1 || width > 0x7FFFFFFFu || height > 0x7FFFFFFFu) return kBadSize;
  out->width = int(width);
  out->height = int(height);
  // libpng's own default limit; decoders refuse more.
  if (width > 1000000 || height > 1000000) return kBadSize;
  int channels = 0;
  bool depth_ok = depth == 8 || depth == 16;
  switch (*colour) {
    case 0: channels = 1; depth_ok = depth_ok || depth == 1 || depth == 2 || depth == 4; break;
    case 2: channels = 3; break;
    case 3: channels = 1; depth_ok = depth == 1 || depth == 2 || depth == 4 || depth == 8; break;
    case 4: channels = 2; break;
    case 6: channels = 4; break;
    default: return kBadPngHeader;
  }
  out->components = *colour == 3 ? 3 : channels;
  if (!depth_ok || p[10] != 0 || p[11] != 0 || p[12] > 1) return kBadPngHeader;
  *raw_bytes = uint64_t(height) * ((uint64_t(width) * channels * depth + 7) / 8);
  return kSound;
}

Fault walk_png(const uint8_t* data, uint64_t size, VqsaScan* out) {
  uint64_t at = 8, raw_bytes = 0, packed_bytes = 0;
  int colour = 0;
  bool has_palette = false, has_data = false, data_ended = false;
  for (bool first = true;; first = false) {
    if (size - at < 12) return kTruncated;
    const uint64_t length = be32(data + at);
    const uint8_t* type = data + at + 4;
    if (length > 0x7FFFFFFFu) return kBadPngChunk;
    if (length > size - at - 12) return kSegmentPastEnd;
    const uint8_t* body = type + 4;
    if (kCrc32(type, length + 4) != be32(body + length)) return kBadPngChecksum;
    at += length + 12;
    auto is = [&](const char* name) { return std::memcmp(type, name, 4) == 0; };
    if (first != is("IHDR")) return kBadPngChunk;
    const bool is_data = is("IDAT");
    if (has_data && !is_data) data_ended = true;
    if (first) {
      if (length != 13) return kBadPngHeader;
      const Fault fault = png_header(body, out, &colour, &raw_bytes);
      if (fault != kSound) return fault;
    } else if (is("PLTE")) {
      if (has_palette || has_data || length == 0 || length > 768 || length % 3) return kBadPngChunk;
      has_palette = true;
    } else if (is_data) {
      if (data_ended || (colour == 3 && !has_palette)) return kBadPngChunk;
      has_data = true;
      packed_bytes += length;
    } else if (is("IEND")) {
      if (length != 0) return kBadPngChunk;
      // deflate expands at most 1032 times, so the bytes there are bound the memory a decoder takes.
      return has_data && raw_bytes / 1032 <= packed_bytes ? kSound : kTooFewData;
    } else if (is("eXIf")) {
      out->orientation = exif_orientation(body, length);
    } else if (!(type[0] & 0x20)) {
      return kBadPngChunk;  // an unknown chunk that claims to be critical
    }
  }
}

constexpr const char* kFaultWords[] = {
#define VQSA_FAULT_WORDS(code, words) words,
    VQSA_FAULTS(VQSA_FAULT_WORDS)
#undef VQSA_FAULT_WORDS
};

}  // namespace

VQSA_API void vqsa_scan(const uint8_t* data, uint64_t size, int32_t expected_width,
                        int32_t expected_height, VqsaScan* out) {
  *out = {kSound, kNoFormat, 0, 0, 0, 1};
  Fault fault = kUnknownFormat;
  if (size == 0) {
    fault = kEmpty;
  } else if (size >= 3 && data[0] == 0xFF && data[1] == 0xD8 && data[2] == 0xFF) {
    out->format = kJpeg;
    fault = Jpeg(data, size, out).walk();
  } else if (size >= 8 && std::memcmp(data, "\x89PNG\r\n\x1a\n", 8) == 0) {
    out->format = kPng;
    fault = walk_png(data, size, out);
  }
  if (fault == kSound && ((expected_width != 0 && expected_width != out->width) ||
                          (expected_height != 0 && expected_height != out->height)))
    fault = kSizeDiffers;
  out->fault = fault;
}

VQSA_API const char* vqsa_fault_words(int32_t code) {
  return code >= 0 && code < kFaultCount ? kFaultWords[code] : nullptr;
}
