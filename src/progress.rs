//! Long work shows where it is and can be stopped.
//!
//! A [`CancelToken`] may be cancelled from any thread and from inside a callback. Work that cannot poll (a running
//! session) registers a hook, which is called at the moment of cancelling.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Result, Status};

type Hook = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Shared {
    cancelled: AtomicBool,
    hooks: Mutex<Hooks>,
}

#[derive(Default)]
struct Hooks {
    next: u64,
    live: Vec<(u64, Hook)>,
}

/// A switch that stops a job. Clones share the switch.
#[derive(Clone, Default)]
pub struct CancelToken {
    shared: Arc<Shared>,
}

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops every job that runs with this token, and those that start with it later, until [`CancelToken::reset`].
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        // Called outside the lock: a hook may end the very job that is about to drop its guard.
        let hooks: Vec<Hook> = self.shared.hooks.lock().live.iter().map(|(_, hook)| hook.clone()).collect();
        hooks.iter().for_each(|hook| hook());
    }

    /// Makes the token usable for another job.
    pub fn reset(&self) {
        self.shared.cancelled.store(false, Ordering::SeqCst);
    }

    /// Whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::SeqCst)
    }

    /// [`Status::Cancelled`] once the token is cancelled.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::new(Status::Cancelled, "the job was cancelled")) } else { Ok(()) }
    }

    /// Calls `hook` when the token is cancelled (at once if it is already), until the guard is dropped. The hook may
    /// run on any thread, may run more than once, and may still be running when the guard is dropped.
    pub fn on_cancel(&self, hook: impl Fn() + Send + Sync + 'static) -> CancelHook {
        let hook: Hook = Arc::new(hook);
        let id = {
            let mut hooks = self.shared.hooks.lock();
            hooks.next += 1;
            let id = hooks.next;
            hooks.live.push((id, hook.clone()));
            id
        };
        if self.is_cancelled() {
            hook();
        }
        CancelHook { shared: self.shared.clone(), id }
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelToken").field("cancelled", &self.is_cancelled()).finish()
    }
}

/// Keeps a hook of [`CancelToken::on_cancel`] registered.
#[must_use = "the hook is removed when this guard is dropped"]
pub struct CancelHook {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for CancelHook {
    fn drop(&mut self) {
        self.shared.hooks.lock().live.retain(|(id, _)| *id != self.id);
    }
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress<'a> {
    /// What is being done, as words for a person, e.g. `"denoise"`.
    pub stage: &'a str,
    /// Units done, in `0..=total`.
    pub done: u64,
    /// Units in all; 0 if unknown.
    pub total: u64,
    /// The running loss, for work that lowers one.
    pub loss: Option<f64>,
}

/// What is told of each unit of work; answering [`ControlFlow::Break`] cancels the job.
pub type Report<'a> = &'a mut dyn FnMut(Progress<'_>) -> ControlFlow<()>;

/// How a caller follows a job and stops it.
#[derive(Default)]
pub struct Job<'a> {
    /// Stops the job from any thread.
    pub cancel: CancelToken,
    /// Told of each unit of work. What it cancels is this job, not the token.
    pub report: Option<Report<'a>>,
}

impl Job<'_> {
    /// Reports progress, then fails with [`Status::Cancelled`] if the caller wants the job to end.
    pub fn step(&mut self, stage: &str, done: u64, total: u64) -> Result<()> {
        self.tell(Progress { stage, done, total, loss: None })
    }

    /// As [`Job::step`], with more to tell.
    pub fn tell(&mut self, progress: Progress<'_>) -> Result<()> {
        self.cancel.check()?;
        let Progress { stage, done, total, .. } = progress;
        if let Some(report) = &mut self.report
            && report(progress).is_break()
        {
            return Err(Error::new(
                Status::Cancelled,
                format!("the job was cancelled while at {stage} {done}/{total}"),
            ));
        }
        self.cancel.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn a_hook_runs_on_cancel_and_not_after_its_guard_is_gone() {
        let token = CancelToken::new();
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = calls.clone();
        let guard = token.on_cancel(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        token.clone().cancel();
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        drop(guard);
        token.cancel();
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert_eq!(token.check().unwrap_err().status(), Status::Cancelled);
        token.reset();
        token.check().unwrap();
    }

    #[test]
    fn a_report_that_breaks_cancels_the_job_but_not_the_token() {
        let mut report = |progress: Progress<'_>| {
            if progress.done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mut job = Job { cancel: CancelToken::new(), report: Some(&mut report) };
        job.step("denoise", 1, 3).unwrap();
        assert_eq!(job.step("denoise", 2, 3).unwrap_err().status(), Status::Cancelled);
        assert!(!job.cancel.is_cancelled());
    }
}
