// Reads many records in one call, outside Python's interpreter lock.
#include <algorithm>
#include <cerrno>
#include <cstdint>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "scan.h"

namespace {

// Returns a fault; on kReadError error holds errno.
Fault read_fully(int fd, uint64_t offset, uint64_t length, uint8_t* to, int32_t* error) {
  while (length > 0) {
    const ssize_t got = pread(fd, to, length, off_t(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      *error = errno;
      return kReadError;
    }
    if (got == 0) return kShortFile;
    to += got;
    offset += uint64_t(got);
    length -= uint64_t(got);
  }
  return kSound;
}

// Whether all pages of a mapped range are in memory. Pages behind the end of a file that became shorter are
// not, so touching what is resident raises no signal.
bool resident(const uint8_t* at, uint64_t length) {
  static const uint64_t page = uint64_t(sysconf(_SC_PAGESIZE));
  uintptr_t begin = reinterpret_cast<uintptr_t>(at) & ~uintptr_t(page - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(at) + length;
  unsigned char state[256];
  while (begin < end) {
    const uint64_t pages = std::min<uint64_t>(sizeof state, (end - begin + page - 1) / page);
    if (mincore(reinterpret_cast<void*>(begin), pages * page, state) != 0) return false;
    for (uint64_t i = 0; i < pages; ++i)
      if (!(state[i] & 1)) return false;
    begin += pages * page;
  }
  return true;
}

// Reads a byte of each page of a range that is in memory, so that whoever reads it next, perhaps under the interpreter
// lock, meets no page fault.
void touch(const uint8_t* at, uint64_t length) {
  static const uint64_t page = uint64_t(sysconf(_SC_PAGESIZE));
  for (uint64_t i = 0; i < length; i += page) (void)*static_cast<const volatile uint8_t*>(at + i);
  if (length > 0) (void)*static_cast<const volatile uint8_t*>(at + length - 1);
}

}  // namespace

// Changes whenever a signature in this library does, so that a stale build is noticed.
VQSA_API int32_t vqsa_records_abi() { return 2; }

// Record i is `length[i]` mapped bytes at `at[i]`, or is passed over where that is null. Where all of it is in
// memory, warm[i] becomes 1 and fault[i] what the scan finds (width and height as for vqsa_read_records);
// elsewhere warm[i] becomes 0.
VQSA_API void vqsa_scan_warm(int64_t count, const uint8_t* const* at, const uint64_t* length,
                             const int32_t* width, const int32_t* height, uint8_t* fault, uint8_t* warm) {
  for (int64_t i = 0; i < count; ++i) {
    warm[i] = at[i] != nullptr && resident(at[i], length[i]);
    if (!warm[i]) continue;
    fault[i] = kSound;
    if (width == nullptr) {
      touch(at[i], length[i]);
      continue;
    }
    VqsaScan result;
    vqsa_scan(at[i], length[i], width[i], height[i], &result);
    fault[i] = uint8_t(result.fault);
  }
}

// Record i is bytes [offset[i], offset[i] + length[i]) of file fd[i] and goes to arena + place[i].
// With width and height (both or neither may be null) each record is scanned and compared with them.
// fault[i] and error[i] (errno, or 0) are always written. Returns the number of records at fault.
VQSA_API int64_t vqsa_read_records(int64_t count, const int32_t* fd, const uint64_t* offset,
                                   const uint64_t* length, uint8_t* arena, uint64_t arena_size,
                                   const uint64_t* place, const int32_t* width, const int32_t* height,
                                   uint8_t* fault, int32_t* error) {
  int64_t at_fault = 0;
  // All reads are announced first, so that the device works on them side by side.
  for (int64_t i = 0; i < count; ++i)
    posix_fadvise(fd[i], off_t(offset[i]), off_t(length[i]), POSIX_FADV_WILLNEED);
  for (int64_t i = 0; i < count; ++i) {
    error[i] = 0;
    if (place[i] > arena_size || length[i] > arena_size - place[i]) {
      fault[i] = kReadError;
      error[i] = EFAULT;
    } else {
      fault[i] = read_fully(fd[i], offset[i], length[i], arena + place[i], &error[i]);
    }
    if (fault[i] == kSound && width != nullptr) {
      VqsaScan result;
      vqsa_scan(arena + place[i], length[i], width[i], height[i], &result);
      fault[i] = uint8_t(result.fault);
    }
    at_fault += fault[i] != kSound;
  }
  return at_fault;
}

// Maps a whole file read-only and keeps no descriptor open, so thousands of shards can stay mapped.
// Returns 0, or errno; ESTALE where the file's size is not the expected one (*size is then the found one).
VQSA_API int32_t vqsa_map_file(const char* path, uint64_t* size, void** address) {
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno;
  struct stat info;
  int32_t error = 0;
  if (fstat(fd, &info) != 0) {
    error = errno;
  } else if (uint64_t(info.st_size) != *size) {
    *size = uint64_t(info.st_size);
    error = ESTALE;
  } else {
    *address = mmap(nullptr, *size, PROT_READ, MAP_SHARED, fd, 0);
    if (*address == MAP_FAILED) error = errno;
  }
  close(fd);
  return error;
}

VQSA_API void vqsa_unmap_file(void* address, uint64_t size) { munmap(address, size); }
