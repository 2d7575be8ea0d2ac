//! One error type for every room, and the status codes that C sees.
//!
//! A status says what a host can do about it; the message says what was wrong, what was expected and where.

use std::fmt;

/// What went wrong, as a number that never changes its meaning. Shared with C as `macula_status`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Status {
    /// Success.
    Ok = 0,
    /// An argument is NULL, out of range, of the wrong shape or not UTF-8.
    InvalidArgument = 1,
    /// A file, folder, tensor, token or name does not exist.
    NotFound = 2,
    /// The operating system refused to read or write.
    Io = 3,
    /// A model or concept file is damaged or contradicts itself.
    InvalidFile = 4,
    /// A well-formed request or model that this library does not handle.
    Unsupported = 5,
    /// A size, depth or count is above the documented limit.
    LimitExceeded = 6,
    /// A concept was found on another base model.
    WrongBase = 7,
    /// ONNX Runtime could not be found, is not one, or is too old.
    RuntimeUnavailable = 8,
    /// A provider was asked for and cannot run.
    ProviderUnavailable = 9,
    /// ONNX Runtime failed to build or run a session.
    RuntimeFailed = 10,
    /// The job was cancelled by the host.
    Cancelled = 11,
    /// Memory could not be had.
    OutOfMemory = 12,
    /// A NaN or infinity appeared; the message names the step.
    NotFinite = 13,
    /// The handle is at work on another job.
    Busy = 14,
    /// The handle was made before a fork and is used in the child.
    Forked = 15,
    /// A defect of this library was caught at the boundary; the handle is no longer usable.
    Panic = 16,
}

/// An error: a [`Status`] for programs and a message for people.
#[derive(Debug)]
pub struct Error {
    status: Status,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of everything that can fail here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given kind.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), source: None }
    }

    /// The same error with the one that caused it.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same error with the place put in front: `context: message`.
    pub fn at(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The kind of error.
    pub fn status(&self) -> Status {
        self.status
    }

    /// What was wrong, what was expected and where.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// [`Status::InvalidArgument`].
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Status::InvalidArgument, message)
    }

    /// [`Status::InvalidFile`].
    pub fn invalid_file(message: impl Into<String>) -> Self {
        Self::new(Status::InvalidFile, message)
    }

    /// [`Status::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Status::Unsupported, message)
    }

    /// [`Status::LimitExceeded`].
    pub fn limit_exceeded(message: impl Into<String>) -> Self {
        Self::new(Status::LimitExceeded, message)
    }

    /// [`Status::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Status::NotFound, message)
    }

    /// An operating-system error while doing something to a path: not-found stays [`Status::NotFound`].
    pub fn io(action: impl fmt::Display, source: std::io::Error) -> Self {
        let status = match source.kind() {
            std::io::ErrorKind::NotFound => Status::NotFound,
            std::io::ErrorKind::OutOfMemory => Status::OutOfMemory,
            _ => Status::Io,
        };
        Self { status, message: format!("{action}: {source}"), source: Some(Box::new(source)) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<std::collections::TryReserveError> for Error {
    fn from(source: std::collections::TryReserveError) -> Self {
        Self { status: Status::OutOfMemory, message: format!("memory: {source}"), source: Some(Box::new(source)) }
    }
}
