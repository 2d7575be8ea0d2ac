//! Inputs and outputs that stay bound from run to run: what costs anything is done once.

use std::ptr::NonNull;
use std::sync::Arc;

use ort::sys;

use super::api::call;
use super::session::{Inner, Session, find, keep};
use super::tensor::{Device, Element, MemoryInfo, Tensor, Value};
use crate::error::{Error, Result, Status};
use crate::progress::CancelToken;

/// A session with tensors bound to its inputs and outputs.
///
/// Bound tensors are used in place. An input may share its memory with clones; an output that was bound may not, since
/// each run writes it. Runs of one session, bound or not, are one at a time.
pub struct Binding {
    inner: Arc<Inner>,
    pointer: NonNull<sys::OrtIoBinding>,
    /// One for each input of the session.
    inputs: Vec<Option<Tensor>>,
    /// Inputs that were written since they were bound. ONNX Runtime copies host memory to a device when it is bound.
    written: Vec<bool>,
    /// One for each output of the session.
    outputs: Vec<Output>,
}

#[derive(Default)]
enum Output {
    #[default]
    Unbound,
    /// Written in place.
    Tensor(Tensor),
    /// Allocated in memory of that kind by each run.
    Allocated(MemoryInfo, Option<Tensor>),
}

// SAFETY: an `OrtIoBinding` is bound to no thread, and is changed only through `&mut self`.
unsafe impl Send for Binding {}
// SAFETY: as above.
unsafe impl Sync for Binding {}

impl Drop for Binding {
    fn drop(&mut self) {
        // SAFETY: ours, released once, before the tensors and the session.
        unsafe { ((*self.inner.loaded.api.0).ReleaseIoBinding)(self.pointer.as_ptr()) }
    }
}

impl Binding {
    pub(super) fn new(session: &Session) -> Result<Self> {
        let inner = session.inner.clone();
        let mut pointer = std::ptr::null_mut();
        // SAFETY: the session is live and kept; the out pointer valid.
        unsafe { call!(inner.loaded.api, CreateIoBinding(inner.pointer.as_ptr(), &mut pointer)) }?;
        let pointer =
            NonNull::new(pointer).ok_or_else(|| Error::new(Status::RuntimeFailed, "ONNX Runtime made no binding"))?;
        let inputs = vec![None; inner.inputs.len()];
        let written = vec![false; inputs.len()];
        let outputs = std::iter::repeat_with(Output::default).take(inner.outputs.len()).collect();
        Ok(Self { inner, pointer, inputs, written, outputs })
    }

    fn input_index(&self, name: &str) -> Result<usize> {
        find(&self.inner.inputs, name, "input")?;
        Ok(self.inner.inputs.iter().position(|(port, _)| port.name == name).unwrap_or_default())
    }

    fn output_index(&self, name: &str) -> Result<usize> {
        find(&self.inner.outputs, name, "output")?;
        Ok(self.inner.outputs.iter().position(|(port, _)| port.name == name).unwrap_or_default())
    }

    /// Binds an input, in place of what was bound before. About a microsecond for memory where the session runs; other
    /// memory is copied there.
    pub fn bind_input(&mut self, name: &str, tensor: Tensor) -> Result<()> {
        let index = self.input_index(name)?;
        self.bind_at(index, tensor)
    }

    fn bind_at(&mut self, index: usize, tensor: Tensor) -> Result<()> {
        let api = self.inner.loaded.api;
        let (port, c_name) = &self.inner.inputs[index];
        port.check(tensor.dtype(), tensor.shape()).map_err(|error| error.at("input"))?;
        let value = tensor.to_value(api)?;
        // SAFETY: the binding shares ownership of the value; the tensor's memory is kept in `inputs` until another
        // takes its place or the binding is gone.
        unsafe { call!(api, BindInput(self.pointer.as_ptr(), c_name.as_ptr(), value.pointer.as_ptr())) }?;
        self.inputs[index] = Some(tensor);
        self.written[index] = false;
        Ok(())
    }

    /// The elements of a bound input, to be written for the next run. Fails as [`Tensor::as_mut_slice`] does.
    pub fn input_mut<T: Element>(&mut self, name: &str) -> Result<&mut [T]> {
        let index = self.input_index(name)?;
        match &mut self.inputs[index] {
            Some(tensor) => {
                self.written[index] = true;
                tensor.as_mut_slice()
            }
            None => Err(Error::invalid_argument(format!("input {name:?} is not bound"))),
        }
    }

    /// Gives a bound input back, to be written elsewhere and bound again; until then the binding can't run. A device's
    /// copy of a host tensor is made when it is bound, so that this is how such an input changes.
    pub fn take_input(&mut self, name: &str) -> Result<Tensor> {
        let index = self.input_index(name)?;
        self.inputs[index].take().ok_or_else(|| Error::invalid_argument(format!("input {name:?} is not bound")))
    }

    /// Lets each run write an output into this tensor. Its memory must not be shared with a clone.
    pub fn bind_output(&mut self, name: &str, tensor: Tensor) -> Result<()> {
        let api = self.inner.loaded.api;
        let index = self.output_index(name)?;
        let (port, c_name) = &self.inner.outputs[index];
        port.check(tensor.dtype(), tensor.shape()).map_err(|error| error.at("output"))?;
        unshared(name, &tensor)?;
        let value = tensor.to_value(api)?;
        // SAFETY: as for inputs; the tensor was checked to be the only owner of its memory, and is so before each run.
        unsafe { call!(api, BindOutput(self.pointer.as_ptr(), c_name.as_ptr(), value.pointer.as_ptr())) }?;
        self.outputs[index] = Output::Tensor(tensor);
        Ok(())
    }

    /// Lets each run allocate an output on a device, in the shape that it has then.
    pub fn allocate_output(&mut self, name: &str, device: Device) -> Result<()> {
        let api = self.inner.loaded.api;
        let index = self.output_index(name)?;
        let own = self.inner.provider.device();
        if device != Device::Host && device != own {
            return Err(Error::invalid_argument(format!(
                "output {name:?} can be left on the host or on {own}, where the session runs; {device} was asked for"
            )));
        }
        let info = MemoryInfo::new(api, device)?;
        let c_name = &self.inner.outputs[index].1;
        // SAFETY: the binding copies the description.
        unsafe { call!(api, BindOutputToDevice(self.pointer.as_ptr(), c_name.as_ptr(), info.pointer.as_ptr())) }?;
        self.outputs[index] = Output::Allocated(info, None);
        Ok(())
    }

    /// What the last run wrote to an output.
    pub fn output(&self, name: &str) -> Result<&Tensor> {
        match &self.outputs[self.output_index(name)?] {
            Output::Tensor(tensor) | Output::Allocated(_, Some(tensor)) => Ok(tensor),
            _ => Err(Error::invalid_argument(format!("output {name:?} was not bound, or there was no run yet"))),
        }
    }

    /// Runs once. All inputs and at least one output must be bound. Cancelling works as with [`Session::run`]; outputs
    /// of a run that failed hold no defined values.
    pub fn run(&mut self, cancel: &CancelToken) -> Result<()> {
        let inner = self.inner.clone();
        let api = inner.loaded.api;
        let bound = |name: &std::ffi::CString| {
            inner.inputs.iter().zip(&self.inputs).any(|((_, own), tensor)| own == name && tensor.is_some())
        };
        inner.complete(bound)?;
        if self.outputs.iter().all(|output| matches!(output, Output::Unbound)) {
            return Err(Error::invalid_argument("no output is bound"));
        }
        for index in 0..self.inputs.len() {
            if self.written[index]
                && inner.provider.device() != Device::Host
                && let Some(tensor) = self.inputs[index].clone()
            {
                self.bind_at(index, tensor)?;
            }
        }
        let binding = self.pointer.as_ptr();
        for ((port, c_name), output) in inner.outputs.iter().zip(&mut self.outputs) {
            match output {
                Output::Tensor(tensor) => unshared(&port.name, tensor)?,
                Output::Allocated(info, result) => {
                    // ONNX Runtime would write into what it allocated last time, which a clone may still read.
                    *result = None;
                    // SAFETY: the binding copies the description.
                    unsafe { call!(api, BindOutputToDevice(binding, c_name.as_ptr(), info.pointer.as_ptr())) }?;
                }
                Output::Unbound => {}
            }
        }
        inner.run(cancel, |session, options| {
            // SAFETY: bound memory is kept by `self`, which is borrowed mutably: nobody reads outputs during the run.
            unsafe {
                call!(api, SynchronizeBoundInputs(binding))?;
                call!(api, RunWithBinding(session, options, binding))?;
                call!(api, SynchronizeBoundOutputs(binding))
            }
        })?;
        self.take_allocated()
    }

    /// Takes what the run allocated. ONNX Runtime gives outputs in the order in which they were first bound.
    fn take_allocated(&mut self) -> Result<()> {
        if !self.outputs.iter().any(|output| matches!(output, Output::Allocated(..))) {
            return Ok(());
        }
        let api = self.inner.loaded.api;
        let allocator = api.default_allocator()?;
        let (mut values, mut count) = (std::ptr::null_mut(), 0);
        let binding = self.pointer.as_ptr();
        // SAFETY: out pointers are valid; each value becomes ours, the array is given back after it was read.
        let values: Vec<Result<Value>> = unsafe {
            call!(api, GetBoundOutputValues(binding, allocator, &mut values, &mut count))?;
            let list = (0..count).map(|i| Value::new(api, *values.add(i))).collect();
            if !values.is_null() {
                call!(api, AllocatorFree(allocator, values.cast()))?;
            }
            list
        };
        for (name, value) in self.bound_output_names()?.into_iter().zip(values) {
            let index = self.output_index(&name)?;
            if let Output::Allocated(_, result) = &mut self.outputs[index] {
                let value = value?;
                let tensor = Tensor::from_value(value, Some(keep(&self.inner)))?;
                *result = Some(tensor);
            }
        }
        Ok(())
    }

    fn bound_output_names(&self) -> Result<Vec<String>> {
        let api = self.inner.loaded.api;
        let allocator = api.default_allocator()?;
        let (mut buffer, mut lengths, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        // SAFETY: out pointers are valid; the buffer holds the names back to back, with the given lengths; both are
        // given back after they were read.
        unsafe {
            call!(api, GetBoundOutputNames(self.pointer.as_ptr(), allocator, &mut buffer, &mut lengths, &mut count))?;
            let mut names = Vec::with_capacity(count);
            let mut at = 0;
            for i in 0..count {
                let length = *lengths.add(i);
                let bytes = std::slice::from_raw_parts(buffer.add(at).cast::<u8>(), length);
                names.push(String::from_utf8_lossy(bytes).into_owned());
                at += length;
            }
            if count > 0 {
                call!(api, AllocatorFree(allocator, buffer.cast()))?;
                call!(api, AllocatorFree(allocator, lengths.cast()))?;
            }
            Ok(names)
        }
    }
}

fn unshared(name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.is_unique() {
        return Ok(());
    }
    Err(Error::invalid_argument(format!(
        "the tensor bound to output {name:?} shares its memory with a clone; a run would write it"
    )))
}
