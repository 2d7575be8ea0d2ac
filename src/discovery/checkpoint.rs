//! A search, the inversion before it and the tuning after it, kept in a file between two batches, so that they can go on
//! where they were broken off.
//!
//! A safetensors file. Of a search: the tensor `losses` and one for each thing that its method remembers; where a token's
//! embedding is learnt, `inverted.losses` and what that remembers; once the tuning has begun, `tuned.losses` and what the
//! tuning remembers. Its metadata has, under `macula.search`, a hash of all that the search depends on: another search never
//! goes on from it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};

use super::descent::Descent;
use super::search::{Numbers, Search};
use crate::concept::{MAX_ROW, MAX_TEXT_ENCODERS};
use crate::error::{Error, Result};
use crate::memory::{copied, room, zeroed};
use crate::os;

const IDENTITY: &str = "macula.search";

/// The longest header of a checkpoint that is read.
const MAX_HEADER_BYTES: usize = 1 << 20;

const LOSSES: &str = "losses";

/// Writes a search, if there is one, and the descents beside it in one piece: on failure what was at `path` stays as it was.
pub(super) fn save(
    path: &Path,
    identity: &str,
    mut search: Option<&mut Search>,
    descents: &mut [&mut Descent],
) -> Result<()> {
    let mut losses = search.as_deref().map(|search| copied(search.losses())).transpose()?;
    let of_descent = |descent: &&mut Descent| Ok((descent.losses_name(), copied(descent.losses())?));
    let mut of_descents = descents.iter().map(of_descent).collect::<Result<Vec<_>>>()?;
    let of_search = search.iter_mut().flat_map(|search| search.memory());
    let mut kept: Vec<(String, Numbers<'_>)> = of_search.map(|(name, numbers)| (name.to_owned(), numbers)).collect();
    kept.extend(losses.iter_mut().map(|losses| (LOSSES.to_owned(), Numbers::F64(losses))));
    kept.extend(descents.iter_mut().flat_map(|descent| descent.memory()));
    kept.extend(of_descents.iter_mut().map(|(name, losses)| (name.clone(), Numbers::F64(losses))));
    let tensors = kept.iter().map(|(name, numbers)| Ok((name.as_str(), view(numbers)?))).collect::<Result<Vec<_>>>()?;
    // The whole file in one vector, which `serialize` makes.
    room(MAX_HEADER_BYTES + kept.iter().map(|(_, numbers)| bytes_of(numbers).len()).sum::<usize>())?;
    let metadata = HashMap::from([(IDENTITY.to_owned(), identity.to_owned())]);
    let bytes = serialize(tensors, Some(metadata)).map_err(|error| Error::invalid_argument(error.to_string()))?;
    os::replace_file(path, &bytes).map_err(|error| Error::io(path.display(), error))
}

/// Brings a search to where the file left it; nothing if there is no file.
///
/// Errors: `InvalidArgument` for the checkpoint of another search; `InvalidFile` for a file that is damaged or is none;
/// `Io`; `OutOfMemory`.
pub(super) fn resume(path: &Path, identity: &str, search: &mut Search) -> Result<()> {
    let most = most_bytes(Some(search), None);
    restore(path, identity, most, |tensors| {
        fill_all(tensors, search.memory())?;
        search.resume(losses_in(tensors, LOSSES)?)
    })
}

/// Brings a descent to where the file left it; nothing if there is no file or the descent had not begun. Errors as
/// [`resume`].
pub(super) fn resume_descent(
    path: &Path,
    identity: &str,
    search: Option<&mut Search>,
    descent: &mut Descent,
) -> Result<()> {
    let most = most_bytes(search, Some(descent));
    restore(path, identity, most, |tensors| {
        let losses = descent.losses_name();
        if tensors.tensor(&losses).is_err() {
            return Ok(());
        }
        fill_all(tensors, descent.memory())?;
        descent.resume(losses_in(tensors, &losses)?)
    })
}

/// The most bytes that a checkpoint takes: a tuning remembers no more than the search before it, and learnt rows take a few
/// megabytes at most.
fn most_bytes(search: Option<&mut Search>, descent: Option<&mut Descent>) -> usize {
    let rows = 3 * MAX_TEXT_ENCODERS * MAX_ROW * size_of::<f32>();
    let of_search = search.into_iter().flat_map(|search| search.memory()).map(|(_, numbers)| bytes_of(&numbers).len());
    let of_descent = descent.into_iter().map(|descent| {
        let memory = descent.memory();
        memory.iter().map(|(_, numbers)| bytes_of(numbers).len()).sum::<usize>()
    });
    MAX_HEADER_BYTES + rows + 2 * of_search.chain(of_descent).sum::<usize>()
}

/// The content of a checkpoint of at most so many bytes, if there is one.
fn read(path: &Path, most: usize) -> Result<Option<Vec<u8>>> {
    let io = |error| Error::io("reading the checkpoint", error);
    // Asked before opening: opening a pipe would wait for its writer.
    let about = match std::fs::metadata(path) {
        Ok(about) => about,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    if !about.is_file() || about.len() > most as u64 {
        return Err(Error::invalid_file(format!("not a checkpoint of this search: no file of at most {most} bytes")));
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(about.len() as usize)?;
    File::open(path).map_err(io)?.take(most as u64).read_to_end(&mut bytes).map_err(io)?;
    Ok(Some(bytes))
}

/// Gives the tensors of a checkpoint of this search to `take`, if there is one.
fn restore(path: &Path, identity: &str, most: usize, take: impl FnOnce(&SafeTensors<'_>) -> Result<()>) -> Result<()> {
    let restored = match read(path, most) {
        Ok(Some(bytes)) => tensors_of(&bytes, identity).and_then(|tensors| take(&tensors)),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    restored.map_err(|error| error.at(path.display()))
}

fn damaged(error: safetensors::SafeTensorError) -> Error {
    Error::invalid_file(format!("not a checkpoint, or a damaged one: {error}")).caused_by(error)
}

fn tensors_of<'b>(bytes: &'b [u8], identity: &str) -> Result<SafeTensors<'b>> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    match header.metadata().as_ref().and_then(|metadata| metadata.get(IDENTITY)) {
        Some(found) if found == identity => {}
        Some(_) => {
            return Err(Error::invalid_argument(
                "the checkpoint is of another search: other pictures, texts, options or weights",
            ));
        }
        None => return Err(Error::invalid_file(format!("not a checkpoint: its metadata lacks {IDENTITY}"))),
    }
    SafeTensors::deserialize(bytes).map_err(damaged)
}

fn fill_all<N: AsRef<str>>(tensors: &SafeTensors<'_>, memory: Vec<(N, Numbers<'_>)>) -> Result<()> {
    memory.into_iter().try_for_each(|(name, mut numbers)| {
        let name = name.as_ref();
        fill(&tensors.tensor(name).map_err(damaged)?, name, &mut numbers)
    })
}

fn losses_in(tensors: &SafeTensors<'_>, name: &str) -> Result<Vec<f64>> {
    let losses = tensors.tensor(name).map_err(damaged)?;
    let mut known = zeroed::<f64>(losses.shape().iter().product())?;
    fill(&losses, name, &mut Numbers::F64(&mut known))?;
    Ok(known)
}

fn fill(tensor: &TensorView<'_>, name: &str, numbers: &mut Numbers<'_>) -> Result<()> {
    let (dtype, shape) = (tensor.dtype(), tensor.shape());
    let expected = view(numbers)?;
    if (dtype, shape) != (expected.dtype(), expected.shape()) {
        let (wanted, sizes) = (expected.dtype(), expected.shape());
        return Err(Error::invalid_file(format!("{name} is {dtype:?} {shape:?}, expected {wanted:?} {sizes:?}")));
    }
    match numbers {
        Numbers::F32(numbers) => bytemuck::cast_slice_mut::<f32, u8>(numbers).copy_from_slice(tensor.data()),
        Numbers::F64(numbers) => bytemuck::cast_slice_mut::<f64, u8>(numbers).copy_from_slice(tensor.data()),
    }
    Ok(())
}

fn view<'n>(numbers: &'n Numbers<'_>) -> Result<TensorView<'n>> {
    let (dtype, count) = match numbers {
        Numbers::F32(numbers) => (Dtype::F32, numbers.len()),
        Numbers::F64(numbers) => (Dtype::F64, numbers.len()),
    };
    TensorView::new(dtype, vec![count], bytes_of(numbers)).map_err(|error| Error::invalid_argument(error.to_string()))
}

/// Numbers as they lie in memory, which is little-endian on every machine that is supported.
fn bytes_of<'n>(numbers: &'n Numbers<'_>) -> &'n [u8] {
    match numbers {
        Numbers::F32(numbers) => bytemuck::cast_slice(numbers),
        Numbers::F64(numbers) => bytemuck::cast_slice(numbers),
    }
}

#[cfg(test)]
mod tests {
    use super::super::search::{Bound, Method, Slope};
    use super::*;
    use crate::error::Status;

    const METHODS: [Method; 3] = [
        Method::Algorithm1 { rho: 0.01 },
        Method::Gradual { stages: 4 },
        Method::LearntMask { rate: 0.1, penalty: 1e-3 },
    ];
    const COUNT: usize = 40;
    const BATCHES: usize = 20;

    fn begun(method: Method) -> Search {
        Search::new(COUNT, BATCHES, method, Bound::Count(6)).unwrap()
    }

    /// A loss of its own for each batch, with its minima between shut and open.
    fn loss(scales: &[f32], batch: usize) -> Result<Slope> {
        let goal = |at: usize| ((at * 7 + batch * 3) % 11) as f32 / 11.0;
        let scales: Vec<f32> = scales.iter().enumerate().map(|(at, scale)| scale - goal(at)).collect();
        Ok(Slope { loss: scales.iter().map(|&slope| f64::from(slope).powi(2) / 2.0).sum(), scales })
    }

    fn run(search: &mut Search, until: usize) {
        while search.losses().len() < until {
            search.step(&mut loss).unwrap();
        }
    }

    #[test]
    fn a_search_broken_off_anywhere_ends_as_in_one_go() {
        let folder = tempfile::tempdir().unwrap();
        for (number, method) in METHODS.into_iter().enumerate() {
            let mut whole = begun(method);
            run(&mut whole, BATCHES);
            assert!(whole.found().unwrap().shut.contains(&true), "{method:?}");
            for broken in 0..=BATCHES {
                let path = folder.path().join(format!("{number}-{broken}"));
                let mut first = begun(method);
                run(&mut first, broken);
                save(&path, "this one", Some(&mut first), &mut []).unwrap();
                let mut second = begun(method);
                resume(&path, "this one", &mut second).unwrap();
                assert_eq!(second.losses().len(), broken);
                run(&mut second, BATCHES);
                let (found, expected) = (second.found().unwrap(), whole.found().unwrap());
                assert_eq!((found.shut, found.losses), (expected.shut, expected.losses), "{method:?} at {broken}");
            }
        }
    }

    #[test]
    fn no_file_is_a_beginning_and_what_is_no_checkpoint_of_this_search_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        let mut search = begun(METHODS[2]);
        resume(&path, "this one", &mut search).unwrap();
        assert!(search.losses().is_empty());
        run(&mut search, 5);
        save(&path, "this one", Some(&mut search), &mut []).unwrap();
        let refused = |path: &Path, identity: &str, method: Method| {
            let error = resume(path, identity, &mut begun(method)).unwrap_err();
            assert!(error.message().contains(&path.display().to_string()), "{error}");
            error.status()
        };
        assert_eq!(refused(&path, "another", METHODS[2]), Status::InvalidArgument);
        assert_eq!(refused(&path, "this one", METHODS[0]), Status::InvalidFile);
        assert_eq!(refused(folder.path(), "this one", METHODS[2]), Status::InvalidFile);
        let bytes = std::fs::read(&path).unwrap();
        for end in [0, 7, 8, 100, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..end]).unwrap();
            assert_eq!(refused(&path, "this one", METHODS[2]), Status::InvalidFile, "{end} bytes");
        }
        let nowhere = folder.path().join("none/kept");
        let error = save(&nowhere, "this one", Some(&mut search), &mut []).unwrap_err();
        assert_eq!(error.status(), Status::NotFound);
        assert!(error.message().contains("none/kept"), "{error}");
    }

    const KEPT: &str = "MACULA_TEST_CHECKPOINT";

    /// The child of the test below: its files may have 64 KiB, as on a disk with no more room.
    #[test]
    fn full_disk_child() {
        let Some(path) = std::env::var_os(KEPT) else { return };
        let limit = libc::rlimit { rlim_cur: 64 << 10, rlim_max: 64 << 10 };
        // SAFETY: `limit` is a valid struct that outlives the call; a signal is only ignored.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
        }
        let mut search = Search::new(100_000, 2, METHODS[0], Bound::Count(1)).unwrap();
        let error = save(Path::new(&path), "this one", Some(&mut search), &mut []).unwrap_err();
        assert_eq!(error.status(), Status::Io);
        assert!(error.message().contains("kept"), "{error}");
    }

    #[test]
    fn a_full_disk_leaves_the_last_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        std::fs::write(&path, "the last one").unwrap();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "discovery::checkpoint::tests::full_disk_child", "--nocapture", "--test-threads=1"])
            .env(KEPT, &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        assert_eq!(std::fs::read(&path).unwrap(), b"the last one");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
