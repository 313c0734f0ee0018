// An emulated CUDA device for a torch that was built without CUDA. See device.py.
//
// A tensor on cuda:0 lives in host memory. Every operator on it runs with the CPU's kernel, by a fallback for the
// dispatch key CUDA, so values are real, and autograd and autocast work as on a GPU. The fallback raises where a GPU
// would (tensors on several devices), and reports what makes the host wait for a GPU.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;

// --- Events: told to Python -----------------------------------------------------------------------------------------

using Callback = void (*)(const char* kind, const char* detail);
Callback callback = nullptr;

void report(const char* kind, const std::string& detail) {
  if (callback != nullptr) callback(kind, detail.c_str());
}

std::string describe(const Tensor& tensor) {
  std::string text = std::string(c10::toString(tensor.scalar_type())) + "[";
  for (auto size : tensor.sizes()) text += std::to_string(size) + ",";
  return text + "]";
}

// --- Memory ---------------------------------------------------------------------------------------------------------

void* allocate_bytes(size_t bytes) {
  void* pointer = nullptr;
  if (posix_memalign(&pointer, 64, bytes ? bytes : 1) != 0) throw std::bad_alloc();
  return pointer;
}

// Memory of the device.
struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = allocate_bytes(bytes);
    return {pointer, pointer, &std::free, c10::Device(c10::kCUDA, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceAllocator* device_allocator() {
  static auto* allocator = new DeviceAllocator();
  return allocator;
}

// Page-locked host memory: copies from and to other host memory make the host wait.
struct PinnedAllocator final : c10::Allocator {
  static PinnedAllocator& instance() {
    static auto* allocator = new PinnedAllocator();
    return *allocator;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = allocate_bytes(bytes);
    add(pointer, bytes ? bytes : 1);
    return {pointer, pointer, &PinnedAllocator::free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &PinnedAllocator::free_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  void add(const void* pointer, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    sizes_[static_cast<const char*>(pointer)] = bytes;
  }
  void remove(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    sizes_.erase(static_cast<const char*>(pointer));
  }
  bool owns(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto next = sizes_.upper_bound(static_cast<const char*>(pointer));
    if (next == sizes_.begin()) return false;
    --next;
    return static_cast<const char*>(pointer) < next->first + next->second;
  }

 private:
  static void free_pinned(void* pointer) {
    instance().remove(pointer);
    std::free(pointer);
  }
  std::mutex mutex_;
  std::map<const char*, size_t> sizes_;
};

// --- Registration: torch takes the device for a real one ------------------------------------------------------------

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override { return PinnedAllocator::instance().owns(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &PinnedAllocator::instance(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return device_allocator(); }
  c10::Device getDeviceFromPtr(void*) const override { return c10::Device(c10::kCUDA, 0); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::globalContext().defaultGenerator(c10::Device(c10::kCPU));
  }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  static c10::Device device() { return c10::Device(c10::kCUDA, 0); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

Guard guard;
const bool guard_is_registered = [] {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
  return true;
}();

// --- Views between the devices: the same memory ---------------------------------------------------------------------

Tensor as_cpu(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  Tensor alias;
  if (tensor.numel() == 0 || tensor.storage().data() == nullptr) {
    alias = at::empty_strided(tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()));
  } else {
    auto* data = static_cast<char*>(tensor.storage().mutable_data()) + tensor.storage_offset() * tensor.itemsize();
    alias = at::from_blob(data, tensor.sizes(), tensor.strides(), [](void*) {}, at::TensorOptions().dtype(tensor.dtype()));
  }
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
  return alias;
}

Tensor as_cuda(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  auto* held = new Tensor(tensor);
  c10::DataPtr data(
      tensor.storage().mutable_data(), held, [](void* kept) { delete static_cast<Tensor*>(kept); },
      c10::Device(c10::kCUDA, 0));
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), device_allocator(), true);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
  return alias;
}

// --- The fallback: any operator, by the CPU's kernel ----------------------------------------------------------------

// The size of their result depends on values.
const std::set<std::string> WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique", "aten::_unique2",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::bincount", "aten::histc", "aten::linalg_eig",
};
// CUDA's kernels take indices on the host.
const std::set<std::string> INDEXING = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), stack_(stack), name_(op.schema().name()), count_(op.schema().arguments().size()) {
    base_ = stack->size() - count_;
    given_.assign(stack->begin() + static_cast<long>(base_), stack->end());
  }

  void run() {
    for (size_t i = 0; i < count_; ++i) to_cpu((*stack_)[base_ + i]);
    check_devices();
    report_waiting();
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (auto& [ours, alias] : aliases_) {  // outputs that the kernel has resized
      if (alias.sizes().equals(ours.sizes())) continue;
      Tensor resized = ours;
      resized.resize_(alias.sizes());
      as_cpu(resized).copy_(alias);
    }
    to_cuda_results();
  }

 private:
  Tensor convert(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.dim() > 0) on_host_ += describe(tensor) + " ";
      return tensor;
    }
    Tensor alias = as_cpu(tensor);
    aliases_.emplace_back(tensor, alias);
    return alias;
  }

  void to_cpu(IValue& value) {
    if (value.isTensor()) {
      value = IValue(convert(value.toTensor()));
    } else if (value.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(convert(tensor));
      value = IValue(tensors);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (std::optional<Tensor> tensor : value.toOptionalTensorList()) {
        if (tensor.has_value() && tensor->defined()) {
          tensors.push_back(convert(*tensor));
        } else {
          tensors.push_back(std::nullopt);
        }
      }
      value = IValue(tensors);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = IValue(c10::Device(c10::kCPU));
    }
  }

  void check_devices() {
    if (aliases_.empty() || on_host_.empty() || INDEXING.count(name_)) return;
    stack_->erase(stack_->begin() + static_cast<long>(base_), stack_->end());
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found cuda:0 and cpu: ", name_, " ", on_host_);
  }

  void report_waiting() {
    if (WAITING.count(name_)) report("sync", name_);
    if (!INDEXING.count(name_)) return;
    if (!aliases_.empty() && !on_host_.empty()) report("sync", name_ + " with indices on the host " + on_host_);
    for (size_t i = 1; i < aliases_.size(); ++i) {
      if (aliases_[i].first.scalar_type() != at::kBool) continue;
      report("sync", name_ + " with a mask " + describe(aliases_[i].first));
      break;
    }
  }

  void to_cuda_results() {
    const auto& schema = op_.schema();
    size_t results = schema.returns().size(), first = stack_->size() - results;
    for (size_t i = 0; i < results; ++i) {
      IValue& value = (*stack_)[first + i];
      if (value.isTensor()) {
        const IValue* same = argument_returned(schema, i);
        value = same != nullptr ? *same : IValue(as_cuda(value.toTensor()));
      } else if (value.isTensorList()) {
        std::vector<Tensor> tensors;
        for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(as_cuda(tensor));
        value = IValue(tensors);
      }
    }
  }

  // The argument that an in-place or out= operator returns.
  const IValue* argument_returned(const c10::FunctionSchema& schema, size_t result) const {
    const auto* alias = schema.returns()[result].alias_info();
    if (alias == nullptr) return nullptr;
    for (size_t i = 0; i < count_; ++i) {
      const auto* other = schema.arguments()[i].alias_info();
      if (other != nullptr && *other == *alias && given_[i].isTensor()) return &given_[i];
    }
    return nullptr;
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::string name_;
  size_t count_, base_;
  std::vector<IValue> given_;
  std::vector<std::pair<Tensor, Tensor>> aliases_;
  std::string on_host_;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

// --- Operators that need the device itself --------------------------------------------------------------------------

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  Tensor made = at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), device_allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
  report("allocation", describe(made));
  return made;
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  Tensor made = at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), device_allocator(),
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
  report("allocation", describe(made));
  return made;
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_cuda() != source.is_cuda()) {
    const Tensor& host = self.is_cuda() ? source : self;
    bool pinned = host.numel() == 0 || PinnedAllocator::instance().owns(host.data_ptr());
    std::string direction = self.is_cuda() ? "copy to the device " : "copy to the host ";
    if (non_blocking && pinned) {
      report("copy", direction + describe(host));
    } else {
      report("sync", direction + (pinned ? "" : "(pageable) ") + describe(host));
    }
  }
  as_cpu(self).copy_(as_cpu(source));
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  report("sync", "value of a tensor " + describe(self));
  return at::_local_scalar_dense(as_cpu(self));
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor view(const Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }
Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}
Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = (impl->numel() + impl->storage_offset()) * self.itemsize();
  if (self.storage().nbytes() < needed) {
    auto larger = device_allocator()->allocate(needed);
    std::memcpy(larger.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(larger));
    self.storage().set_nbytes(needed);
  }
  return self;
}

Tensor& set_storage_sizes(
    Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.empty()) {
    auto contiguous = c10::contiguous_strides(size);
    impl->set_sizes_and_strides(size, contiguous, offset);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}
Tensor& set_storage(Tensor& self, at::Storage storage) {
  std::vector<int64_t> size{static_cast<int64_t>(storage.nbytes() / self.itemsize())}, stride{1};
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(size, stride, 0);
  return self;
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

void record_stream(Tensor& self, at::Stream) {}

// As on a GPU: the flash kernel in half precision; in fp32 the plain one.
int64_t fused_sdp_choice(
    const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
    bool) {
  bool half = query.scalar_type() == at::kBFloat16 || query.scalar_type() == at::kHalf;
  return half ? 1 : 0;  // sdp::SDPBackend
}

using FlashOutput =
    std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

FlashOutput flash_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double dropout, bool causal, bool,
    std::optional<double> scale) {
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      as_cpu(query), as_cpu(key), as_cpu(value), dropout, causal, std::nullopt, scale);
  auto none = [] { return as_cuda(at::empty({0})); };
  return {as_cuda(out), as_cuda(sums), none(), none(), query.size(2), key.size(2), none(), none(), none()};
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal,
    const Tensor&, const Tensor&, std::optional<double> scale) {
  auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      as_cpu(gradient), as_cpu(query), as_cpu(key), as_cpu(value), as_cpu(out), as_cpu(sums), dropout, causal,
      std::nullopt, scale);
  return {as_cuda(of_query), as_cuda(of_key), as_cuda(of_value)};
}

// As nn.Conv2d calls it on a GPU; the CPU has no kernel of this name.
Tensor conv_depthwise2d(
    const Tensor& self, const Tensor& weight, c10::IntArrayRef, const std::optional<Tensor>& bias,
    c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation) {
  std::optional<Tensor> host_bias;
  if (bias.has_value() && bias->defined()) host_bias = as_cpu(*bias);
  return as_cuda(at::conv2d(as_cpu(self), as_cpu(weight), host_bias, stride, padding, dilation, self.size(1)));
}

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &fused_sdp_choice)
}

extern "C" {
void emulated_device_report_to(Callback reported) { callback = reported; }
// cudaHostRegister and cudaHostUnregister.
void emulated_device_pin(const void* pointer, size_t bytes) { PinnedAllocator::instance().add(pointer, bytes); }
void emulated_device_unpin(const void* pointer) { PinnedAllocator::instance().remove(pointer); }
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  library.impl("as_strided", TORCH_FN(as_strided));
  library.impl("view", TORCH_FN(view));
  library.impl("_reshape_alias", TORCH_FN(reshape_alias));
  library.impl("unfold", TORCH_FN(unfold));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage_sizes));
  library.impl("set_.source_Storage", TORCH_FN(set_storage));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library.impl("record_stream", TORCH_FN(record_stream));
  library.impl("_scaled_dot_product_flash_attention", TORCH_FN(flash_attention));
  library.impl("_scaled_dot_product_flash_attention_backward", TORCH_FN(flash_attention_backward));
  library.impl("_conv_depthwise2d", TORCH_FN(conv_depthwise2d));
}
