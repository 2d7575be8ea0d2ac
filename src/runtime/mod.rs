//! ONNX Runtime: found, checked, loaded and run. The only room that names `ort`.
//!
//! [`Runtime::load`] finds the library and checks it; [`Runtime::session`] makes a model ready; [`Session::run`] and
//! [`Binding`] run it. Messages of ONNX Runtime go to the `log` crate under the target `macula::onnxruntime`; nothing
//! is written to standard output or error. Telemetry is off.

mod api;
mod binding;
mod library;
mod provider;
mod session;
mod tensor;

use std::fmt;
use std::path::Path;

pub use binding::Binding;
pub use library::{ApiBase, LIBRARY_VARIABLE, LogSink, RuntimeOptions};
pub use provider::{
    ArenaGrowth, ConvolutionSearch, CudaOptions, Provider, ProviderKind, ShapeProfile, TensorRtOptions,
};
pub use session::{Dimension, Optimization, Port, Session, SessionOptions};
pub use tensor::{Device, Element, ElementType, Tensor};

use crate::error::Result;

/// The ONNX Runtime of this process. Cheap to clone; it stays loaded until the process ends.
#[derive(Clone)]
pub struct Runtime {
    loaded: &'static library::Loaded,
    log: Option<LogSink>,
}

impl Runtime {
    /// Loads ONNX Runtime, or gives the one that this process already uses. [`RuntimeOptions`] says where it is looked
    /// for; [`crate::Status::RuntimeUnavailable`] says what was tried, found and needed.
    pub fn load(options: &RuntimeOptions) -> Result<Self> {
        Ok(Self { loaded: library::load(options)?, log: options.log.clone() })
    }

    /// The version of the library, e.g. `"1.32.0"`.
    pub fn version(&self) -> &str {
        &self.loaded.version
    }

    /// The library's absolute path; `None` if the host gave it and the loader does not say whose it is.
    pub fn path(&self) -> Option<&Path> {
        self.loaded.path.as_deref()
    }

    /// The providers that the library was compiled with, by ONNX Runtime's names. That says nothing about drivers.
    pub fn compiled_providers(&self) -> Result<Vec<String>> {
        self.loaded.api.compiled_providers()
    }

    /// A session of a serialized model whose external data, if any, lies under `folder`. The model is trusted: use
    /// [`Runtime::session`] for one that is not.
    pub fn session_from_bytes(&self, model: &[u8], folder: Option<&Path>, options: &SessionOptions) -> Result<Session> {
        let chosen = session::choose_provider(self.loaded, self.log.as_ref(), options)?;
        Session::create(self.loaded, &session::Serialized { model, folder }, options, chosen)
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("version", &self.version()).field("path", &self.path()).finish()
    }
}
