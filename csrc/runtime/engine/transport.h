// How blocks travel between their source and the slots. The engine decides which block gets which slot; a transport
// keeps the order of the transfers safe and carries them out: StreamTransport for blocks in a HostPool (streams and
// events, the host never waits), DiskTransport for blocks in a BlockFile (worker threads). The rules both keep, per
// slot s and block b:
//   upload to s    after the upload before it, after s's readers, after the download from s, after b's last download
//   reader of s    after the upload to s, after readers on other streams, after a download from s that has begun
//   download of s  after s's readers, after every upload of b, and to a file not before the journal is durable
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/device/device.h"
#include "runtime/engine/recorder.h"

namespace distzo2 {

// Shared by an engine and its transport.
struct EngineState {
    std::shared_ptr<Device> device;
    std::vector<size_t> block_bytes;
    std::vector<size_t> tails; // of each block of a HostPool, the bytes at its end that no download stores; or empty
    std::vector<std::byte*> slots; // page-aligned on the CPU device with a file
    size_t slot_bytes = 0;

    std::mutex mutex; // guards what follows, and the transport
    std::condition_variable changed;
    bool closing = false;
    std::string error; // the first failure of any transfer; kept
    Recorder recorder;

    void fail(const std::string& text) {
        if (error.empty())
            error = text;
        changed.notify_all();
    }
    void raise_if_failed() const {
        if (!error.empty())
            throw std::runtime_error(error);
    }
};

using Lock = std::unique_lock<std::mutex>;

struct SlotPhase {
    bool queued = false;  // an upload that has not begun, and can be recalled
    bool loading = false; // an upload is under way
    bool storing = false; // a download is to come or under way
    bool gated = false;   // which waits for the journal
};

// All functions but the constructor's and stop() are called with the state's lock held and the device entered.
class Transport {
  public:
    virtual ~Transport() = default;
    virtual SlotPhase phase(int slot) = 0;
    // Whether the slot may be given to another block now; recalls an upload to it that has not begun.
    virtual bool take(int slot) = 0;
    // The slot that still holds the block's bytes because its download has not ended, or -1. An upload of the block to
    // that slot moves nothing.
    virtual int storing_slot(int block) = 0;
    virtual void upload(int block, int slot, bool urgent) = 0;
    virtual void hurry(int slot) = 0; // an upload that has not begun goes first
    virtual void download(int block, int slot, int64_t version) = 0;
    // Takes a download of `block` from the slot back if it has not begun, and returns its version.
    virtual std::optional<int64_t> recall_download(int block, int slot) = 0;
    // Makes `stream` (on a CPU: this thread, without the lock meanwhile) wait until the slot may be read and written.
    virtual void await(Lock& lock, int block, int slot, Stream stream) = 0;
    virtual bool times_waits() const = 0; // records kWait itself
    virtual void reader_done(int slot, Stream stream) = 0;
    virtual bool is_present(int slot) = 0;
    virtual void set_durable(int64_t version) = 0;
    virtual void flush(Lock& lock) = 0; // returns when every download has ended
    virtual void update_stats() = 0;    // brings the recorder up to date
    // Ends what is under way, and makes the queued downloads that the journal allows. No call may follow.
    virtual void stop() noexcept = 0;
};

// The events of a slot's readers: one a stream, kept, since a later record on the same stream covers the earlier ones.
class ReaderEvents {
  public:
    void record(Device& device, Stream stream) {
        for (Reader& reader : readers_)
            if (reader.stream == stream) {
                device.record(reader.event, stream);
                reader.pending = true;
                return;
            }
        readers_.push_back({stream, device.create_event(false), true});
        device.record(readers_.back().event, stream);
    }
    void wait(Device& device, Stream stream, bool skip_own = false) const {
        for (const Reader& reader : readers_)
            if (reader.pending && !(skip_own && reader.stream == stream))
                device.wait(stream, reader.event);
    }
    void clear() { // all that must come after the readers has been made to wait
        for (Reader& reader : readers_)
            reader.pending = false;
    }
    void destroy(Device& device) noexcept {
        for (Reader& reader : readers_)
            device.destroy_event(reader.event);
        readers_.clear();
    }

  private:
    struct Reader {
        Stream stream;
        Event event;
        bool pending;
    };
    std::vector<Reader> readers_;
};

} // namespace distzo2
