//! Opaque pointers are keys of a table, never addresses.
//!
//! So a handle that is stale, freed twice, of another kind or plainly invented is an error with a message instead of a
//! wild read, and a handle that is at work cannot be freed under its job. Keys are never used again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::RwLock;

use super::guard::claim_process;
use crate::error::{Error, Result, Status};

/// A kind of object that C holds by an opaque pointer.
pub(super) trait Object: Send + Sync + Sized + 'static {
    /// Its C name.
    const NAME: &'static str;
    /// Tells keys of different kinds apart: unique, in `1..16`.
    const TAG: usize;
    /// Every live object of this kind.
    fn table() -> &'static Table<Self>;
    /// Whether no job is running on it, so that it may be freed.
    fn is_idle(&self) -> bool {
        true
    }
}

/// Makes a type an [`Object`].
macro_rules! object {
    ($type:ident, $tag:literal $(, idle: $idle:expr)?) => {
        impl $crate::capi::handle::Object for $type {
            const NAME: &'static str = stringify!($type);
            const TAG: usize = $tag;
            fn table() -> &'static $crate::capi::handle::Table<Self> {
                static TABLE: $crate::capi::handle::Table<$type> = $crate::capi::handle::Table::new();
                &TABLE
            }
            $(fn is_idle(&self) -> bool {
                let idle: fn(&$type) -> bool = $idle;
                idle(self)
            })?
        }
    };
}
pub(super) use object;

/// A live object and whether a panic has made it unusable.
pub(super) struct Entry<T> {
    /// The object.
    pub(super) object: T,
    /// Set when a call that used the object panicked.
    pub(super) poisoned: Arc<AtomicBool>,
}

impl<T> std::ops::Deref for Entry<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.object
    }
}

/// The live objects of one kind.
pub(super) struct Table<T> {
    live: RwLock<BTreeMap<usize, Arc<Entry<T>>>>,
}

const TAG_BITS: u32 = 4;

impl<T: Object> Table<T> {
    pub(super) const fn new() -> Self {
        Self { live: RwLock::new(BTreeMap::new()) }
    }

    /// Takes the object in and returns its key.
    pub(super) fn insert(&self, object: T) -> *mut T {
        // The first key lies above the pages that no program may map, so that reading through it faults.
        static NEXT: AtomicUsize = AtomicUsize::new(0x10000);
        claim_process();
        let key = (NEXT.fetch_add(1, Ordering::Relaxed) << TAG_BITS) | T::TAG;
        let entry = Entry { object, poisoned: Arc::new(AtomicBool::new(false)) };
        self.live.write().insert(key, Arc::new(entry));
        std::ptr::without_provenance_mut(key)
    }

    /// The object of a key.
    pub(super) fn get(&self, pointer: *const T, parameter: &str) -> Result<Arc<Entry<T>>> {
        if pointer.is_null() {
            return Err(Error::invalid_argument(format!("{parameter} is NULL")));
        }
        self.live.read().get(&pointer.addr()).cloned().ok_or_else(|| unknown::<T>(pointer, parameter))
    }

    /// Takes the object out, unless it is at work; it is dropped when the last call that uses it returns.
    pub(super) fn remove(&self, pointer: *const T) -> Result<()> {
        let removed = {
            let mut live = self.live.write();
            let entry = live.get(&pointer.addr()).ok_or_else(|| unknown::<T>(pointer, "handle"))?;
            if !entry.poisoned.load(Ordering::SeqCst) && !entry.object.is_idle() {
                return Err(Error::new(Status::Busy, format!("the {} is at work and was not freed", T::NAME)));
            }
            live.remove(&pointer.addr())
        };
        drop(removed);
        Ok(())
    }
}

fn unknown<T: Object>(pointer: *const T, parameter: &str) -> Error {
    let key = pointer.addr();
    let why = if key & ((1 << TAG_BITS) - 1) == T::TAG { "it was freed or never made" } else { "it is something else" };
    Error::invalid_argument(format!("{parameter} ({pointer:p}) is no live {}: {why}", T::NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Thing(bool);
    object!(Thing, 15, idle: |thing| thing.0);
    struct Other;
    object!(Other, 14);

    #[test]
    fn a_stale_foreign_or_invented_handle_is_an_error() {
        let thing = Thing::table().insert(Thing(true));
        assert!(Thing::table().get(thing, "thing").is_ok());
        let other = Other::table().insert(Other);
        let error = Thing::table().get(other.cast(), "thing").err().unwrap();
        assert!(error.message().contains("something else"), "{error}");
        Thing::table().remove(thing).unwrap();
        let error = Thing::table().remove(thing).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument);
        assert!(error.message().contains("freed"), "{error}");
        assert!(Thing::table().get(std::ptr::null(), "thing").is_err());
        Other::table().remove(other).unwrap();
    }

    #[test]
    fn an_object_at_work_is_not_freed() {
        let thing = Thing::table().insert(Thing(false));
        assert_eq!(Thing::table().remove(thing).unwrap_err().status(), Status::Busy);
        assert!(Thing::table().get(thing, "thing").is_ok());
    }
}
