// Structural scan of one encoded image: is it whole, and can a decoder be trusted with its headers?
//
// Damaged headers crash some decoders outright instead of raising an error, so every record is walked
// here first. The walk follows ITU-T T.81 (JPEG) and the PNG specification, and refuses what
// libjpeg-turbo would refuse; pixels are not decoded.
#pragma once

#include <cstdint>

#define VQSA_API extern "C" __attribute__((visibility("default")))

// One table for codes and words; Python reads the words from here. New faults go to the end: codes are
// stored in logs.
#define VQSA_FAULTS(X)                                                                        \
  X(kSound, "sound")                                                                          \
  X(kEmpty, "zero bytes")                                                                     \
  X(kUnknownFormat, "neither JPEG nor PNG")                                                   \
  X(kTruncated, "truncated: the data end before the image's end marker")                      \
  X(kSegmentPastEnd, "truncated or damaged: a segment reaches past the end of the data")      \
  X(kNoMarker, "damaged: no JPEG marker where a segment must begin")                          \
  X(kBadMarker, "damaged: a JPEG marker that may not stand there")                            \
  X(kBadSegment, "damaged: a JPEG segment of impossible length")                              \
  X(kUnsupportedJpeg, "unsupported JPEG: lossless, hierarchical, arithmetic or not 8 bit")    \
  X(kBadFrame, "damaged: JPEG frame header")                                                  \
  X(kBadSize, "width or height is zero or beyond what decoders accept")                       \
  X(kBadSampling, "damaged or unsupported: JPEG sampling factors")                            \
  X(kBadQuantTable, "damaged: JPEG quantisation table")                                       \
  X(kBadHuffmanTable, "damaged: JPEG Huffman table")                                          \
  X(kBadScan, "damaged: JPEG scan header")                                                    \
  X(kMissingTable, "damaged: a JPEG scan uses a table that is not defined")                   \
  X(kTooFewData, "truncated: fewer image data than the stated size needs")                    \
  X(kMissingScan, "truncated: a JPEG component without image data")                           \
  X(kTooManyScans, "refused: more than 500 JPEG scans")                                       \
  X(kBadPngHeader, "damaged or unsupported: PNG header")                                      \
  X(kBadPngChunk, "damaged: PNG chunks")                                                      \
  X(kBadPngChecksum, "damaged: a PNG chunk's checksum differs")                               \
  X(kSizeDiffers, "width or height differ from the manifest's")                               \
  X(kReadError, "the operating system could not read the record")                             \
  X(kShortFile, "the file ends before the record does")

enum Fault : uint8_t {
#define VQSA_FAULT_CODE(code, words) code,
  VQSA_FAULTS(VQSA_FAULT_CODE)
#undef VQSA_FAULT_CODE
  kFaultCount
};

enum Format : int32_t { kNoFormat = 0, kJpeg = 1, kPng = 2 };

struct VqsaScan {
  int32_t fault;        // a Fault
  int32_t format;       // a Format; known as soon as the signature is
  int32_t width;        // as stored, before EXIF orientation; 0 where the header was not reached
  int32_t height;
  int32_t components;   // JPEG 1, 3, 4; PNG 1 to 4, a palette counts as 3
  int32_t orientation;  // EXIF 1 to 8; 1 where there is none
};

// Never reads outside data[0, size). An expected width or height of 0 is not compared.
VQSA_API void vqsa_scan(const uint8_t* data, uint64_t size, int32_t expected_width,
                        int32_t expected_height, VqsaScan* out);

// The words of a fault code, or null beyond the last one.
VQSA_API const char* vqsa_fault_words(int32_t code);
