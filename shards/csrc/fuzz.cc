// Mutates the images named on the command line and scans them; built with sanitizers by
// tests/test_shards_scan.py, which passes when nothing is reported.
//
//   fuzz ROUNDS FILE...
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "scan.h"

namespace {

uint64_t state = 0x9E3779B97F4A7C15u;

uint64_t draw(uint64_t below) {  // xorshift64: the same mutations on every run
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return below ? state % below : 0;
}

std::vector<uint8_t> load(const char* path) {
  std::vector<uint8_t> data;
  if (std::FILE* file = std::fopen(path, "rb")) {
    for (int c; (c = std::fgetc(file)) != EOF;) data.push_back(uint8_t(c));
    std::fclose(file);
  }
  return data;
}

void mutate(std::vector<uint8_t>& data) {
  const uint64_t kind = draw(4), size = data.size();
  if (size == 0) return;
  const uint64_t head = draw(2) ? size : (size < 700 ? size : 700);
  if (kind == 0) {
    data.resize(draw(2) ? draw(size + 1) : draw(head + 1));
    // Half of the time let the last segment end exactly where the data do, so that a parser of its
    // body that believes a count inside it runs out of the buffer.
    uint64_t at = data.size();
    while (at > 4 && !(data[at - 4] == 0xFF && data[at - 3] > 0xBF)) --at;
    if (draw(2) && at > 4) {
      const uint64_t length = data.size() - (at - 2);
      data[at - 2] = uint8_t(length >> 8);
      data[at - 1] = uint8_t(length);
    }
  } else if (kind == 1) {
    const uint64_t at = draw(size), count = 1 + draw(64);
    data.erase(data.begin() + long(at), data.begin() + long(at + count < size ? at + count : size));
  } else {
    for (uint64_t n = 1 + draw(6); n > 0; --n) {
      const uint8_t values[] = {0x00, 0xFF, 0x01, 0x7F, uint8_t(draw(256))};
      data[draw(head)] = values[draw(5)];
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const long rounds = argc > 2 ? std::atol(argv[1]) : 0;
  long sound = 0, total = 0;
  for (int i = 2; i < argc; ++i) {
    const std::vector<uint8_t> seed = load(argv[i]);
    for (long round = 0; round < rounds; ++round, ++total) {
      std::vector<uint8_t> data = seed;
      if (round > 0) mutate(data);
      // An allocation of exactly this size, so that reading one byte too far is noticed.
      std::unique_ptr<uint8_t[]> exact(new uint8_t[data.size()]);
      if (!data.empty()) std::memcpy(exact.get(), data.data(), data.size());
      VqsaScan found;
      vqsa_scan(exact.get(), data.size(), 0, 0, &found);
      if (vqsa_fault_words(found.fault) == nullptr) return 1;
      sound += found.fault == kSound;
    }
  }
  std::printf("%ld scanned, %ld sound\n", total, sound);
  return total == 0;
}
