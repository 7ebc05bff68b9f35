// ThreadState: torch's thread-local modes (grad mode, dispatch keys with autocast's switches, function and dispatch
// modes) as one thread has them, to be taken over by another for the length of a lane.

#include <ATen/ThreadLocalState.h>
#include <pybind11/pybind11.h>

#include <memory>

#include "common/check.h"

namespace distzo2 {
namespace {

class ThreadState {
  public:
    ThreadState() : state_(at::ThreadLocalState()) {}

    void enter() {
        DZO_CHECK(!guard_, "ThreadState.enter() was called twice without exit()");
        guard_ = std::make_unique<at::ThreadLocalStateGuard>(state_);
    }

    // Must run in the thread that entered: the guard puts that thread's own state back.
    void exit() { guard_.reset(); }

  private:
    at::ThreadLocalState state_;
    std::unique_ptr<at::ThreadLocalStateGuard> guard_;
};

} // namespace

void register_thread_state(pybind11::module_& m) {
    pybind11::class_<ThreadState>(m, "ThreadState",
                                  "The calling thread's torch modes. enter() takes them over in another thread, "
                                  "exit() in that same thread puts its own back.")
        .def(pybind11::init<>())
        .def("enter", &ThreadState::enter)
        .def("exit", &ThreadState::exit);
}

} // namespace distzo2
