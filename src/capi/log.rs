//! Log
//!
//! What the library and ONNX Runtime have to say besides their results. It goes to the callbacks of live runtime handles
//! and nowhere else: with no callback, nothing is said. A callback hears what concerns the library as a whole, and the
//! models of the pipelines that were opened with its handle.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::{Arc, Once};

use log::{LevelFilter, Log, Metadata, Record};
use parking_lot::RwLock;

use super::argument::c_text;
use crate::error::{Error, Result};
use crate::runtime::LogSink;

/// How much is logged, or how grave a message is: one of `MACULA_LOG_*`.
pub type macula_log_level = i32;

/// Nothing.
pub const MACULA_LOG_OFF: macula_log_level = 0;

/// Something failed.
pub const MACULA_LOG_ERROR: macula_log_level = 1;

/// Something works, but otherwise than a host may expect: a provider that was replaced, a damaged cache made anew.
pub const MACULA_LOG_WARNING: macula_log_level = 2;

/// What was chosen and found.
pub const MACULA_LOG_INFO: macula_log_level = 3;

/// Everything.
pub const MACULA_LOG_DEBUG: macula_log_level = 4;

/// Receives one message.
///
/// - `userdata`: what was given beside the callback.
/// - `level`: how grave it is, `MACULA_LOG_ERROR` to `MACULA_LOG_DEBUG`.
/// - `target`: which part speaks, e.g. `"macula::onnxruntime"`; never NULL; stays for the call only.
/// - `message`: the message, one or more lines without a line end; never NULL; stays for the call only.
///
/// Called on any thread, also on several at once, and also on threads of ONNX Runtime. It may call any function of this
/// header; freeing the runtime handle that it belongs to is `BUSY` from inside it.
pub type macula_log_fn = Option<
    unsafe extern "C" fn(userdata: *mut c_void, level: macula_log_level, target: *const c_char, message: *const c_char),
>;

/// One live callback; calls hold `gate` for reading, and ending it waits for them.
pub(super) struct Sink {
    callback: unsafe extern "C" fn(*mut c_void, macula_log_level, *const c_char, *const c_char),
    userdata: *mut c_void,
    level: LevelFilter,
    live: RwLock<bool>,
}

// SAFETY: the header says that the callback is called from any thread, and the user pointer is only handed to it.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

static SINKS: RwLock<Vec<Arc<Sink>>> = RwLock::new(Vec::new());

thread_local! {
    /// Log callbacks that this thread is inside of.
    static INSIDE: Cell<u32> = const { Cell::new(0) };
}

/// A callback that hears messages until this is dropped.
pub(super) struct Subscription(Arc<Sink>);

impl Sink {
    /// Makes the callback, if it is still live and wants to hear this.
    fn say(&self, level: log::Level, target: &str, message: &str) {
        if level > self.level {
            return;
        }
        let live = self.live.read_recursive();
        if !*live {
            return;
        }
        let number = match level {
            log::Level::Error => MACULA_LOG_ERROR,
            log::Level::Warn => MACULA_LOG_WARNING,
            log::Level::Info => MACULA_LOG_INFO,
            log::Level::Debug | log::Level::Trace => MACULA_LOG_DEBUG,
        };
        let (target, message) = (c_text(target), c_text(message));
        INSIDE.set(INSIDE.get() + 1);
        // SAFETY: a live callback of the host; the texts stay for the call.
        unsafe { (self.callback)(self.userdata, number, target.as_ptr(), message.as_ptr()) };
        INSIDE.set(INSIDE.get() - 1);
    }
}

impl Subscription {
    /// Takes the messages about one runtime's sessions; silent once the subscription has ended.
    pub(super) fn log_sink(&self) -> LogSink {
        let sink = self.0.clone();
        LogSink::new(move |level, message| sink.say(level, "macula::onnxruntime", message))
    }
}

/// Begins to send messages to a callback; `None` if there is no callback or nothing is to be logged.
pub(super) fn subscribe(
    callback: macula_log_fn,
    userdata: *mut c_void,
    level: macula_log_level,
) -> Result<Option<Subscription>> {
    let level = match level {
        MACULA_LOG_OFF => LevelFilter::Off,
        MACULA_LOG_ERROR => LevelFilter::Error,
        MACULA_LOG_WARNING => LevelFilter::Warn,
        MACULA_LOG_INFO => LevelFilter::Info,
        MACULA_LOG_DEBUG => LevelFilter::Trace,
        other => return Err(Error::invalid_argument(format!("options.log_level is {other}, not a MACULA_LOG_*"))),
    };
    let Some(callback) = callback.filter(|_| level != LevelFilter::Off) else { return Ok(None) };
    static ONCE: Once = Once::new();
    // A Rust program that links the library may have a logger of its own: then that one hears everything.
    ONCE.call_once(|| _ = log::set_logger(&Dispatcher));
    let sink = Arc::new(Sink { callback, userdata, level, live: RwLock::new(true) });
    SINKS.write().push(sink.clone());
    listen();
    Ok(Some(Subscription(sink)))
}

/// Whether this thread is inside a log callback, where no subscription can be ended.
pub(super) fn is_logging() -> bool {
    INSIDE.get() > 0
}

impl Drop for Subscription {
    fn drop(&mut self) {
        SINKS.write().retain(|sink| !Arc::ptr_eq(sink, &self.0));
        listen();
        // Waits for callbacks on other threads; none is made afterwards.
        *self.0.live.write() = false;
    }
}

/// Lets the `log` macros skip what nobody hears.
fn listen() {
    let level = SINKS.read().iter().map(|sink| sink.level).max();
    log::set_max_level(level.unwrap_or(LevelFilter::Off));
}

struct Dispatcher;

impl Log for Dispatcher {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let sinks: Vec<Arc<Sink>> = SINKS.read().clone();
        let message = record.args().to_string();
        sinks.iter().for_each(|sink| sink.say(record.level(), record.target(), &message));
    }

    fn flush(&self) {}
}
