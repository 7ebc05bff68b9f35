// Orderings that a build for mutation tests can leave out one at a time, to show that a test notices. With
// DISTZO2_MUTATIONS defined, kept() is false for the ordering that the environment variable DISTZO2_DROP names;
// otherwise it is true at compile time.
#pragma once

#if defined(DISTZO2_MUTATIONS)
#include <cstdlib>
#include <string_view>
#endif

namespace distzo2 {

// Each is a wait, by what waits and what for; transport.h states the rules. tools/check_mutations.py tries them all.
#define DISTZO2_ORDERINGS(X)                                                                                           \
    X(upload_after_upload)          /* to the same slot, by other streams */                                           \
    X(upload_after_readers)         /* of the slot */                                                                  \
    X(upload_after_slot_is_stored)  /* its download reads the slot */                                                  \
    X(upload_after_block_is_stored) /* host or disk side: its download writes the block */                             \
    X(upload_pieces_join)           /* all streams' pieces before the slot is ready */                                 \
    X(download_after_readers)       /* who write the slot */                                                           \
    X(download_after_uploads)       /* of the block: to the slot, and dropped ones, which read the host's copy */      \
    X(download_pieces_join)         /* all streams' pieces before the block is stored */                               \
    X(reader_after_upload)                                                                                             \
    X(reader_after_readers)        /* of other streams */                                                              \
    X(reader_after_slot_is_stored) /* who may write what a download still reads */                                     \
    /* The same between a file and the slots. */                                                                       \
    X(file_upload_after_readers)                                                                                       \
    X(file_upload_after_slot_is_stored)                                                                                \
    X(file_upload_after_block_is_stored)                                                                               \
    X(file_download_after_uploads)                                                                                     \
    X(file_download_after_readers)                                                                                     \
    X(file_download_after_journal) /* the write-ahead rule */                                                          \
    X(file_reader_after_upload)                                                                                        \
    X(file_reader_after_readers)                                                                                       \
    X(file_reader_after_slot_is_stored)                                                                                \
    X(file_after_staging_copy) /* a staging buffer is written to the file, or used again, after its copy */            \
    /* Inside a durable file, of a block that is replaced. */                                                          \
    X(block_entry_after_data)   /* the entry is written after the bytes are on the disk */                             \
    X(block_commit_after_entry) /* a commit has ended, and its block is what a crash leaves, after the entry is */     \
    X(block_copy_after_entry)   /* the second copy of the entry is touched after the first is on the disk */           \
    X(block_slot_after_entry)   /* the old slot is used again after it */

enum class Ordering {
#define X(name) name,
    DISTZO2_ORDERINGS(X)
#undef X
};

#if defined(DISTZO2_MUTATIONS)
inline const char* ordering_name(Ordering ordering) {
    static const char* const names[] = {
#define X(name) #name,
        DISTZO2_ORDERINGS(X)
#undef X
    };
    return names[static_cast<int>(ordering)];
}
inline bool kept(Ordering ordering) {
    static const char* const dropped = std::getenv("DISTZO2_DROP");
    return dropped == nullptr || std::string_view(dropped) != ordering_name(ordering);
}
#else
constexpr bool kept(Ordering) { return true; }
#endif

} // namespace distzo2
