//! ONNX Runtime: found, checked, loaded and run. The only room that names `ort`.
//!
//! [`Runtime::load`] finds the library and checks it; [`Runtime::session`] makes a model ready; [`Session::run`] and
//! [`Binding`] run it. Messages of ONNX Runtime go to the `log` crate under the target `macula::onnxruntime`; nothing
//! is written to standard output or error. Telemetry is off.

mod api;
mod binding;
mod cache;
mod library;
mod observe;
mod provider;
mod session;
mod tensor;

use std::fmt;
use std::path::Path;

pub use binding::Binding;
pub use library::{ApiBase, LIBRARY_VARIABLE, LogSink, RuntimeOptions};
pub use observe::observe;
pub use provider::{
    ArenaGrowth, ConvolutionSearch, CudaOptions, Provider, ProviderKind, ShapeProfile, TensorRtOptions,
};
pub use session::{Dimension, Optimization, Port, Session, SessionMemory, SessionOptions};
pub use tensor::{Device, Element, ElementType, Tensor};

use crate::error::{Error, Result};
use crate::onnx::Model;
use crate::os;
use session::Serialized;

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

    /// A session of a model. Its external files are checked again just before ONNX Runtime reads them.
    ///
    /// Errors: [`crate::Status::ProviderUnavailable`] with the reason; [`crate::Status::InvalidFile`] if external data
    /// changed since the model was opened; [`crate::Status::Unsupported`] for inputs or outputs that are no dense
    /// tensors; [`crate::Status::RuntimeFailed`] with ONNX Runtime's words.
    pub fn session(&self, model: &Model, options: &SessionOptions) -> Result<Session> {
        let weights = model.weight_bytes()?;
        let source = model.for_session()?;
        let serialized = Serialized { model: &source.bytes, folder: source.folder.as_deref(), weights };
        if let Some(cache) = &options.cache
            && let Some(session) = self.cached_session(cache, model, &serialized, options)?
        {
            return Ok(session);
        }
        Session::create(self.loaded, &serialized, options, self.choose(options)?)
    }

    /// A session by way of the cache; `None` if the cache is of no use here, which is never a reason to fail.
    fn cached_session(
        &self,
        cache: &Path,
        model: &Model,
        source: &Serialized<'_>,
        options: &SessionOptions,
    ) -> Result<Option<Session>> {
        let chosen = self.choose(options)?;
        if chosen.provider.kind() == ProviderKind::TensorRt {
            return Ok(None);
        }
        let useless = |error: Error| {
            log::warn!(target: "macula::runtime", "the cache {} is not used: {error}", cache.display());
            Ok(None)
        };
        let slot = match cache::Slot::new(cache, self.loaded, model, source.model, &chosen.provider, options) {
            Ok(slot) => slot,
            Err(error) => return useless(error),
        };
        if let Some((bytes, folder)) = slot.read() {
            // What ONNX Runtime wrote passes the same checks as what anybody else wrote.
            let outcome = Model::from_bytes(bytes, Some(&folder), model.limits())
                .and_then(|optimized| optimized.for_session())
                .and_then(|optimized| {
                    let source = Serialized { model: &optimized.bytes, folder: optimized.folder.as_deref(), ..*source };
                    let mut as_it_is = options.clone();
                    as_it_is.optimization = Optimization::Off;
                    Session::create(self.loaded, &source, &as_it_is, self.choose(&as_it_is)?)
                });
            match outcome {
                Ok(session) => return Ok(Some(session)),
                Err(error) => slot.discard(error.message()),
            }
        }
        let written = slot.write().and_then(|writing| {
            writing.configure(&chosen.raw)?;
            let session = Session::create(self.loaded, source, options, chosen)?;
            Ok((session, writing))
        });
        match written {
            Ok((session, writing)) => {
                if let Err(error) = writing.finish(options.cache_limit) {
                    log::warn!(target: "macula::runtime", "the optimised graph is not kept: {error}");
                }
                Ok(Some(session))
            }
            Err(error) => useless(error),
        }
    }

    fn choose(&self, options: &SessionOptions) -> Result<session::Chosen> {
        session::choose_provider(self.loaded, self.log.as_ref(), options)
    }
}

/// How much RAM this process takes now and took at most, in bytes, all of its parts together; `None` where the system
/// does not say.
pub fn process_memory() -> Option<(u64, u64)> {
    os::resident_memory().map(|memory| (memory.current, memory.peak))
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("version", &self.version()).field("path", &self.path()).finish()
    }
}
