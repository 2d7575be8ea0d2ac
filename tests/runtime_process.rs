//! What sessions do to the process that hosts them: nothing. One test, since all figures are the process's.

use std::fs;
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::time::Duration;

use macula::progress::CancelToken;
use macula::runtime::{ElementType, Runtime, RuntimeOptions, SessionOptions, Tensor};

mod small_models;
use small_models::{broken_reshape, chain, model};

/// CPU time of all threads so far.
fn cpu_time() -> Duration {
    // SAFETY: an all-zero `rusage` is valid, and is filled by the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut usage), 0);
        usage
    };
    let seconds = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn entries(folder: &str) -> usize {
    fs::read_dir(folder).unwrap().count()
}

fn sockets() -> usize {
    let targets = fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

/// The x87 and SSE control words: rounding, masked exceptions, flushing of denormals.
#[cfg(target_arch = "x86_64")]
fn float_state() -> (u16, u32) {
    let (mut x87, mut sse) = (0_u16, 0_u32);
    // SAFETY: both instructions only store the control words.
    unsafe {
        std::arch::asm!("fnstcw [{}]", in(reg) &mut x87, options(nostack));
        std::arch::asm!("stmxcsr [{}]", in(reg) &mut sse, options(nostack));
    }
    /// Without the sticky flags of exceptions that happened.
    const CONTROL: u32 = !0x3f;
    (x87, sse & CONTROL)
}

/// Runs `work` with standard output and error in a file; gives what was written to it.
fn silenced(work: impl FnOnce()) -> String {
    let mut file = tempfile::tempfile().unwrap();
    // SAFETY: plain duplication of descriptors, restored below.
    unsafe {
        let saved = [libc::dup(1), libc::dup(2)];
        assert!(saved.iter().all(|&fd| fd >= 0));
        assert!(libc::dup2(file.as_raw_fd(), 1) == 1 && libc::dup2(file.as_raw_fd(), 2) == 2);
        work();
        for (fd, saved) in saved.into_iter().enumerate() {
            assert!(libc::dup2(saved, fd as i32 + 1) >= 0);
            libc::close(saved);
        }
    }
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_process_is_left_as_it_was() {
    let mut two_threads = SessionOptions::default();
    two_threads.intra_threads = 2;
    let cancel = CancelToken::new();
    let x = Tensor::from_vec(&[64, 64], (0..4096).map(|i| (i as f32).sin()).collect()).unwrap();
    let small = model(chain(64, 4));
    let mut runtime = None;
    let environment: Vec<_> = std::env::vars_os().collect();
    let folder = std::env::current_dir().unwrap();
    let floats = float_state();
    let threads_before = entries("/proc/self/task");

    let printed = silenced(|| {
        let loaded = Runtime::load(&RuntimeOptions::default()).expect("set MACULA_ONNXRUNTIME");
        let session = loaded.session(&small, &two_threads).unwrap();
        session.run(&[("x", &x)], &[], &cancel).unwrap();
        let broken = loaded.session(&model(broken_reshape()), &two_threads).unwrap();
        let five = Tensor::zeros(ElementType::F32, &[5]).unwrap();
        broken.run(&[("x", &five)], &[], &cancel).unwrap_err();
        let cache = tempfile::tempdir().unwrap();
        let mut cached = two_threads.clone();
        cached.cache = Some(cache.path().into());
        (0..2).for_each(|_| drop(loaded.session(&small, &cached).unwrap()));
        runtime = Some(loaded);
    });
    assert_eq!(printed, "", "something was printed");
    assert_eq!(sockets(), 0);
    assert_eq!(std::env::vars_os().collect::<Vec<_>>(), environment);
    assert_eq!(std::env::current_dir().unwrap(), folder);
    assert_eq!(float_state(), floats);
    let runtime = runtime.unwrap();

    // Threads without work sleep, even those that spin while a run is at work.
    for spinning in [false, true] {
        let mut options = two_threads.clone();
        options.spinning = spinning;
        let session = runtime.session(&small, &options).unwrap();
        for _ in 0..20 {
            session.run(&[("x", &x)], &[], &cancel).unwrap();
        }
        let before = cpu_time();
        std::thread::sleep(Duration::from_secs(1));
        let spent = cpu_time() - before;
        assert!(spent < Duration::from_millis(20), "an idle session used {spent:?} of a second ({spinning})");
    }

    // A thousand sessions leave nothing behind.
    let round = || {
        let session = runtime.session(&small, &two_threads).unwrap();
        session.run(&[("x", &x)], &[], &cancel).unwrap();
        let mut binding = session.bind().unwrap();
        binding.bind_input("x", x.clone()).unwrap();
        binding.bind_output("y", Tensor::zeros(ElementType::F32, &[64, 64]).unwrap()).unwrap();
        binding.run(&cancel).unwrap();
    };
    let figures = || {
        let resident = macula::runtime::process_memory().unwrap().0;
        (resident, entries("/proc/self/task"), entries("/proc/self/fd"))
    };
    (0..100).for_each(|_| round());
    let (memory, threads, files) = figures();
    (0..1000).for_each(|_| round());
    let (memory_after, threads_after, files_after) = figures();
    let growth = memory_after.saturating_sub(memory);
    assert!(growth < 4 << 20, "1,000 sessions left {growth} bytes");
    assert_eq!((threads_after, files_after), (threads, files));
    assert_eq!(threads_after, threads_before, "the library keeps a thread");
}
