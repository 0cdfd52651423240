// Two CUDA cards without a driver, for PyTorch's CPU build: each thread has a current card, as with CUDA, and nothing is ever
// done on it. Autograd and FakeTensorMode ask for no more. `fake_card.py` says what it is for.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <Python.h>

namespace {

constexpr c10::DeviceIndex CARDS = 2;
thread_local c10::DeviceIndex current = 0;

c10::Device card(c10::DeviceIndex index) { return c10::Device(c10::DeviceType::CUDA, index); }
c10::Stream only_stream(c10::DeviceIndex index) { return c10::Stream(c10::Stream::DEFAULT, card(index)); }
c10::DeviceIndex exchange(c10::DeviceIndex index) {
  c10::DeviceIndex before = current;
  if (index >= 0) current = index;
  return before;
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device device) const override { return card(exchange(device.index())); }
  c10::Device getDevice() const override { return card(current); }
  void setDevice(c10::Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchange(device.index()); }
  c10::Stream getStream(c10::Device device) const noexcept override { return only_stream(device.index()); }
  c10::Stream getNewStream(c10::Device device, int) const override { return only_stream(device.index()); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return CARDS; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  int getNumGPUs() const override { return CARDS; }
  c10::DeviceIndex deviceCount() const override { return CARDS; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { exchange(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

const Guard guard;
const bool registered = [] {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
  return true;
}();

// exchange_device(index) -> the index before; -1 only asks.
PyObject* py_exchange(PyObject*, PyObject* index) {
  long asked = PyLong_AsLong(index);
  return PyErr_Occurred() ? nullptr : PyLong_FromLong(exchange(static_cast<c10::DeviceIndex>(asked)));
}

PyMethodDef methods[] = {{"exchange_device", py_exchange, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "fake_card_guard", nullptr, -1, methods};

}  // namespace

namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::CUDAHooks) }

PyMODINIT_FUNC PyInit_fake_card_guard() { return PyModule_Create(&module); }
