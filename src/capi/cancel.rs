//! Cancelling
//!
//! A token stops the jobs that it was given to, from any thread. A job also stops when its progress callback returns
//! non-zero; use a token when the wish to stop comes from elsewhere, a button for one. On the CPU a running session
//! stops between two nodes of its graph; CUDA and TensorRT finish what was already handed to the device first.

use super::argument::out;
use super::guard::{guard, guard_free};
use super::handle::{Object, object};
use super::status::macula_status;
use crate::progress::CancelToken;

/// A switch that stops jobs.
pub struct macula_cancel_token {
    pub(super) token: CancelToken,
}
object!(macula_cancel_token, 1);

/// Makes a token that is not cancelled.
///
/// - `out_token`: receives the token; not NULL. Free it with `macula_cancel_token_free`.
///
/// Errors: `INVALID_ARGUMENT`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_cancel_token_create(out_token: *mut *mut macula_cancel_token) -> macula_status {
    guard("macula_cancel_token_create", |_| {
        // SAFETY: valid as the header asks.
        let out_token = unsafe { out(out_token, "out_token") }?;
        out_token.set(macula_cancel_token::table().insert(macula_cancel_token { token: CancelToken::new() }));
        Ok(())
    })
}

/// Stops every job that runs with the token, and each that starts with it later, until `macula_cancel_token_reset`.
/// Returns at once; the jobs return `MACULA_STATUS_CANCELLED` a little later and their pipelines stay usable.
///
/// - `token`: a live token; not NULL.
///
/// Errors: `INVALID_ARGUMENT`. Any thread, also from inside a callback; not from a signal handler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_cancel_token_cancel(token: *mut macula_cancel_token) -> macula_status {
    guard("macula_cancel_token_cancel", |call| {
        call.object(token, "token")?.token.cancel();
        Ok(())
    })
}

/// Makes a cancelled token usable for another job.
///
/// - `token`: a live token; not NULL.
///
/// Errors: `INVALID_ARGUMENT`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_cancel_token_reset(token: *mut macula_cancel_token) -> macula_status {
    guard("macula_cancel_token_reset", |call| {
        call.object(token, "token")?.token.reset();
        Ok(())
    })
}

/// Whether the token is cancelled.
///
/// - `token`: a live token; not NULL.
/// - `out_cancelled`: receives 1 or 0; not NULL.
///
/// Errors: `INVALID_ARGUMENT`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_cancel_token_is_cancelled(
    token: *const macula_cancel_token,
    out_cancelled: *mut i32,
) -> macula_status {
    guard("macula_cancel_token_is_cancelled", |call| {
        let token = call.object(token, "token")?;
        // SAFETY: valid as the header asks.
        unsafe { out(out_cancelled, "out_cancelled") }?.set(token.token.is_cancelled().into());
        Ok(())
    })
}

/// Frees a token. Jobs that still run with it go on, and can no longer be stopped by it.
///
/// - `token`: a live token; may be NULL, then nothing happens.
///
/// Errors: `INVALID_ARGUMENT` for a handle that is not live. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_cancel_token_free(token: *mut macula_cancel_token) -> macula_status {
    guard_free("macula_cancel_token_free", token)
}
