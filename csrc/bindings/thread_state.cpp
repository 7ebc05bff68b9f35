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
                                  R"(The calling thread's torch modes, for another thread to run under.

Grad mode, autocast, and function and dispatch modes, as they are when the object is made.)")
        .def(pybind11::init<>())
        .def("enter", &ThreadState::enter,
             "Gives the modes to the calling thread. Raises RuntimeError when called twice without exit().")
        .def("exit", &ThreadState::exit, "Gives the thread that entered its own modes back.");
}

} // namespace distzo2
