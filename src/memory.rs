//! Memory that may not be there: vectors whose size comes from a file or a caller, and stacks of threads, as an error where
//! `vec!`, `collect` and a thread's start would end the process. Knows nothing of what they hold.

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result, Status};

/// `count` times the default: zero for numbers.
pub(crate) fn zeroed<T: Clone + Default>(count: usize) -> Result<Vec<T>> {
    filled(count, T::default())
}

/// `count` times a value.
pub(crate) fn filled<T: Clone>(count: usize, value: T) -> Result<Vec<T>> {
    let mut filled = Vec::new();
    filled.try_reserve_exact(count)?;
    filled.resize(count, value);
    Ok(filled)
}

/// A copy.
pub(crate) fn copied<T: Clone>(values: &[T]) -> Result<Vec<T>> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(values.len())?;
    copy.extend_from_slice(values);
    Ok(copy)
}

/// What an iterator gives. Where it doesn't tell how much that is, the vector grows as it comes.
pub(crate) fn collected<T>(values: impl IntoIterator<Item = T>) -> Result<Vec<T>> {
    let mut collected = Vec::new();
    extend(&mut collected, values)?;
    Ok(collected)
}

/// Puts what an iterator gives behind what is there.
pub(crate) fn extend<T>(target: &mut Vec<T>, values: impl IntoIterator<Item = T>) -> Result<()> {
    let mut values = values.into_iter();
    let (least, most) = values.size_hint();
    target.try_reserve(least)?;
    if most == Some(least) {
        // There is room for all of them: the standard library's loop takes several at a time.
        target.extend(values);
        return Ok(());
    }
    while let Some(value) = values.next() {
        if target.len() == target.capacity() {
            target.try_reserve(values.size_hint().0.max(1))?;
        }
        target.push(value);
    }
    Ok(())
}

/// What a product of matrices packs into memory of its own, at most, on each thread.
pub(crate) const PANELS: usize = 4 << 20;

/// More than the nodes and names of any UNet and its gradient take, and the graph of one while a session is made.
pub(crate) const GRAPH: usize = 64 << 20;

/// Fails unless so many bytes can be had now. For work whose many small allocations, or those of another crate, can't fail
/// one by one: a graph's nodes and names, the panels of a matrix product.
pub(crate) fn room(bytes: usize) -> Result<()> {
    let mut space = Vec::<u8>::new();
    space.try_reserve_exact(bytes)?;
    // An allocation that nothing uses the compiler may leave out, and take it for granted.
    std::hint::black_box(space.as_mut_ptr());
    Ok(())
}

/// What a thread takes when it starts: its stack, the one for signals, and what its first allocations set aside.
const THREAD: usize = 4 << 20;

/// So many threads, 0 for one a core, all of them at work when this returns: one that finds no memory for its second stack
/// ends the process, so none may start later, when there may be less.
pub(crate) fn threads(count: usize, name: &'static str) -> Result<ThreadPool> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    room(THREAD.saturating_mul(if count == 0 { cores() } else { count }))?;
    let pool = ThreadPoolBuilder::new().num_threads(count).thread_name(move |index| format!("{name}-{index}"));
    let pool = pool
        .build()
        .map_err(|error| Error::new(Status::OutOfMemory, "threads could not be started").caused_by(error))?;
    pool.broadcast(|_| ());
    Ok(pool)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_had_is_an_error() {
        const ALL: usize = isize::MAX as usize;
        for refused in [zeroed::<u8>(ALL).map(drop), filled(ALL, 1u8).map(drop), room(ALL)] {
            assert_eq!(refused.unwrap_err().status(), Status::OutOfMemory);
        }
        assert_eq!(collected((0..ALL).map(|_| 0u8)).unwrap_err().status(), Status::OutOfMemory);
    }

    #[test]
    fn everything_comes_in_its_order() {
        assert_eq!(
            collected((0..100).filter(|number| number % 7 == 0)).unwrap(),
            (0..100).step_by(7).collect::<Vec<_>>()
        );
        let mut numbers = copied(&[1, 2]).unwrap();
        extend(&mut numbers, [3, 4]).unwrap();
        assert_eq!(
            (numbers, zeroed::<u16>(2).unwrap(), filled(2, 'a').unwrap()),
            (vec![1, 2, 3, 4], vec![0, 0], vec!['a', 'a'])
        );
    }
}
