//! Finding and refusing ONNX Runtime's library. A process loads one library for ever, so that each case is a child
//! process: this program again, at one ignored test.

use std::ffi::{CStr, CString, c_char, c_void};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use macula::Status;
use macula::progress::CancelToken;
use macula::runtime::{ApiBase, LIBRARY_VARIABLE, Runtime, RuntimeOptions, SessionOptions, Tensor};

mod small_models;
use small_models::{product, product_model};

const CASE: &str = "MACULA_TEST_CASE";
const PLACE: &str = "MACULA_TEST_PLACE";
const REPORT: &str = "MACULA_TEST_REPORT";

fn library() -> PathBuf {
    let path = std::env::var_os(LIBRARY_VARIABLE).expect("set MACULA_ONNXRUNTIME to ONNX Runtime's library");
    fs::canonicalize(path).expect("MACULA_ONNXRUNTIME names no file")
}

struct Outcome {
    status: i32,
    message: String,
    took: Duration,
}

/// Runs `case` in a child and gives what it reported.
fn child(case: &str, place: &Path, variable: Option<&Path>) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_process", "--ignored", "--test-threads=1"]);
    command.env(CASE, case).env(PLACE, place).env(REPORT, &report).env_remove(LIBRARY_VARIABLE);
    command.env("HOME", folder.path()).env_remove("XDG_DATA_HOME");
    if let Some(path) = variable {
        command.env(LIBRARY_VARIABLE, path);
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.signal(), None, "{case}: killed by a signal");
    assert!(output.status.success(), "{case}: {}", String::from_utf8_lossy(&output.stdout));
    let text = fs::read_to_string(&report).expect("the child wrote no report");
    let mut lines = text.splitn(3, '\n');
    let mut next = || lines.next().unwrap().to_owned();
    Outcome { status: next().parse().unwrap(), took: Duration::from_micros(next().parse().unwrap()), message: next() }
}

#[test]
#[ignore = "one case of the other tests, in a process of its own"]
fn child_process() {
    let Ok(case) = std::env::var(CASE) else { return };
    let place = PathBuf::from(std::env::var_os(PLACE).unwrap());
    let mut options = RuntimeOptions::default();
    let before = Instant::now();
    let outcome = match case.as_str() {
        "default" => Runtime::load(&options),
        "option" => {
            options.library = Some(place);
            Runtime::load(&options)
        }
        "host" => {
            options.api_base = host_base(&place);
            Runtime::load(&options)
        }
        "two requests" => {
            options.library = Some(place.clone());
            let first = Runtime::load(&options).unwrap();
            assert_eq!(Runtime::load(&RuntimeOptions::default()).unwrap().path(), first.path());
            assert_eq!(Runtime::load(&options).unwrap().path(), first.path());
            options.library = Some(place.parent().unwrap().join("libother.so"));
            Runtime::load(&options)
        }
        "another first" => {
            let copy = place.parent().unwrap().join("copy.so");
            let other = Other::open(&copy);
            let before = other.run();
            options.library = Some(place);
            let outcome = Runtime::load(&options);
            if let Ok(runtime) = &outcome {
                assert_eq!(ours(runtime), before);
                assert_eq!(other.run(), before);
            }
            outcome
        }
        other => panic!("no case {other}"),
    };
    let took = before.elapsed();
    let (status, message) = match outcome {
        Ok(runtime) => {
            assert_eq!(ours(&runtime), EXPECTED);
            (0, runtime.path().unwrap().display().to_string())
        }
        Err(error) => (error.status() as i32, error.message().to_owned()),
    };
    fs::write(std::env::var_os(REPORT).unwrap(), format!("{status}\n{}\n{message}", took.as_micros())).unwrap();
}

const EXPECTED: [f32; 4] = [10.0, 10.0, 10.0, 10.0];
const X: [f32; 4] = [1.0, 2.0, 3.0, 4.0];

/// [`EXPECTED`] by our runtime: `X` times a matrix of ones.
fn ours(runtime: &Runtime) -> Vec<f32> {
    let mut options = SessionOptions::default();
    options.intra_threads = 1;
    let session = runtime.session(&product_model(), &options).unwrap();
    let x = Tensor::from_slice(&[1, 4], &X).unwrap();
    let w = Tensor::from_vec(&[4, 4], vec![1_f32; 16]).unwrap();
    session.run(&[("x", &x), ("w", &w)], &["z"], &CancelToken::new()).unwrap().remove(0).into_vec().unwrap()
}

/// Opens the library as a host would.
fn open(path: &Path) -> *const ort::sys::OrtApiBase {
    let name = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a valid path; the symbol has this signature.
    unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!handle.is_null(), "dlopen {}: {:?}", path.display(), CStr::from_ptr(libc::dlerror()));
        let symbol = libc::dlsym(handle, c"OrtGetApiBase".as_ptr());
        assert!(!symbol.is_null());
        let get = std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *const ort::sys::OrtApiBase>(symbol);
        get()
    }
}

fn host_base(path: &Path) -> Option<ApiBase> {
    // SAFETY: the library is never closed.
    unsafe { ApiBase::from_raw(open(path).cast()) }
}

/// Another ONNX Runtime in the same process, used by its C functions alone.
struct Other {
    api: &'static ort::sys::OrtApi,
    session: *mut ort::sys::OrtSession,
}

impl Other {
    fn open(path: &Path) -> Self {
        let base = open(path);
        let model = product();
        // SAFETY: the library is new enough for the table; all pointers are live.
        unsafe {
            let api = ((*base).GetApi)(ort::sys::ORT_API_VERSION).as_ref().unwrap();
            let (mut env, mut options, mut session) =
                (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
            let level = ort::sys::OrtLoggingLevel::ORT_LOGGING_LEVEL_WARNING;
            assert!((api.CreateEnv)(level, c"other".as_ptr(), &mut env).0.is_null());
            assert!((api.CreateSessionOptions)(&mut options).0.is_null());
            assert!((api.SetIntraOpNumThreads)(options, 1).0.is_null());
            let status = (api.CreateSessionFromArray)(env, model.as_ptr().cast(), model.len(), options, &mut session);
            assert!(status.0.is_null());
            Self { api, session }
        }
    }

    fn run(&self) -> Vec<f32> {
        let api = self.api;
        let (mut x, mut w) = (X, [1_f32; 16]);
        // SAFETY: the tensors outlive the values; all pointers are live.
        unsafe {
            let mut info = std::ptr::null_mut();
            let arena = ort::sys::OrtAllocatorType::OrtArenaAllocator;
            let memory = ort::sys::OrtMemType::OrtMemTypeDefault;
            assert!((api.CreateCpuMemoryInfo)(arena, memory, &mut info).0.is_null());
            let value = |data: &mut [f32], shape: [i64; 2]| {
                let mut value = std::ptr::null_mut();
                let kind = ort::sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
                let bytes = size_of_val(data);
                let data = data.as_mut_ptr().cast();
                let status =
                    (api.CreateTensorWithDataAsOrtValue)(info, data, bytes, shape.as_ptr(), 2, kind, &mut value);
                assert!(status.0.is_null());
                value.cast_const()
            };
            let inputs = [value(&mut x, [1, 4]), value(&mut w, [4, 4])];
            let names: [*const c_char; 2] = [c"x".as_ptr(), c"w".as_ptr()];
            let outputs: [*const c_char; 1] = [c"z".as_ptr()];
            let mut result = std::ptr::null_mut();
            let run = (api.Run)(
                self.session,
                std::ptr::null(),
                names.as_ptr(),
                inputs.as_ptr(),
                2,
                outputs.as_ptr(),
                1,
                &mut result,
            );
            assert!(run.0.is_null());
            let mut data = std::ptr::null_mut();
            assert!((api.GetTensorMutableData)(result, &mut data).0.is_null());
            std::slice::from_raw_parts(data.cast::<f32>(), 4).to_vec()
        }
    }
}

/// A shared library made of C.
fn compiled(folder: &Path, name: &str, source: &str) -> PathBuf {
    let c = folder.join(format!("{name}.c"));
    let library = folder.join(format!("{name}.so"));
    fs::write(&c, source).unwrap();
    let status = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&c).status();
    assert!(status.expect("the tests need a C compiler as `cc`").success());
    library
}

/// What an ONNX Runtime of that version looks like to a loader; it has no table to give.
fn pretender(version: &str) -> String {
    format!(
        r#"
        struct OrtApiBase {{ const void *(*GetApi)(unsigned); const char *(*GetVersionString)(void); }};
        static const void *api(unsigned version) {{ (void)version; return 0; }}
        static const char *version(void) {{ return "{version}"; }}
        static const struct OrtApiBase base = {{ api, version }};
        const struct OrtApiBase *OrtGetApiBase(void) {{ return &base; }}
        "#
    )
}

#[test]
fn what_is_no_usable_library_is_refused_in_time_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let write = |name: &str, bytes: &[u8]| {
        fs::write(place(name), bytes).unwrap();
        place(name)
    };
    let real = fs::read(library()).unwrap();
    let mut foreign = real.clone();
    foreign[18] = 183;
    let mut narrow = real.clone();
    narrow[4] = 1;
    let fifo = place("fifo.so");
    let name = CString::new(fifo.to_str().unwrap()).unwrap();
    // SAFETY: a valid path.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    fs::create_dir(place("folder")).unwrap();
    let cases = [
        (place("missing.so"), "No such file"),
        (write("empty.so", b""), "it is empty"),
        (write("two.so", b"\x7fE"), "not an ELF shared library"),
        (write("text.so", b"#!/bin/sh\nexit 1\n"), "not an ELF shared library"),
        (write("header.so", &real[..40]), "truncated"),
        (write("half.so", &real[..real.len() / 2]), "truncated"),
        (write("tail.so", &real[..real.len() - 1]), "truncated"),
        (write("foreign.so", &foreign), "another architecture"),
        (write("narrow.so", &narrow), "another architecture"),
        (fifo, "not a regular file"),
        (place("folder"), "the folder holds no libonnxruntime.so"),
        (std::env::current_exe().unwrap(), ""),
        (compiled(folder.path(), "other", "int answer(void) { return 42; }"), "no OrtGetApiBase"),
        (compiled(folder.path(), "old", &pretender("1.15.0")), "found version 1.15.0; needed: 1.21"),
        (compiled(folder.path(), "second", &pretender("2.30.0")), "found version 2.30.0; needed: 1.21"),
        (compiled(folder.path(), "hollow", &pretender("1.99.0")), "does not give API 21"),
        (compiled(folder.path(), "odd", &pretender("nightly")), "is no version"),
        (
            compiled(folder.path(), "null", "const void *OrtGetApiBase(void) { return 0; }"),
            "OrtGetApiBase returned NULL",
        ),
    ];
    for (path, reason) in cases {
        for by_variable in [false, true] {
            let outcome = if by_variable {
                child("default", Path::new(""), Some(&path))
            } else {
                child("option", &path, Some(&library()))
            };
            let (message, name) = (&outcome.message, path.display());
            assert_eq!(outcome.status, Status::RuntimeUnavailable as i32, "{name}: {message}");
            assert!(message.contains(reason) && message.contains(&name.to_string()), "{name}: {message}");
            assert!(message.contains("needed") && message.contains("1.21"), "{name}: {message}");
            assert!(outcome.took < Duration::from_secs(1), "{name}: {:?}", outcome.took);
        }
    }
}

#[test]
fn the_library_is_found_by_option_variable_folder_and_default_place() {
    let library = library();
    let shown = library.display().to_string();
    let nowhere = Path::new("/nonexistent/libonnxruntime.so");
    for (case, place, variable) in [
        ("option", library.as_path(), Some(nowhere)),
        ("option", library.parent().unwrap(), None),
        ("default", nowhere, Some(library.as_path())),
        ("host", &library, Some(nowhere)),
    ] {
        let outcome = child(case, place, variable);
        assert_eq!((outcome.status, &outcome.message), (0, &shown), "{case} {}", place.display());
    }
}

#[test]
fn without_any_library_all_places_are_named() {
    let outcome = child("default", Path::new(""), None);
    // In a checkout that `cargo xtask` has prepared, the default place has one.
    if outcome.status == 0 {
        assert!(outcome.message.contains("/onnxruntime"), "{}", outcome.message);
        return;
    }
    assert_eq!(outcome.status, Status::RuntimeUnavailable as i32);
    for place in ["debug/onnxruntime", ".local/share/macula/onnxruntime", LIBRARY_VARIABLE] {
        assert!(outcome.message.contains(place), "{}", outcome.message);
    }
}

#[test]
fn a_process_keeps_its_library() {
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("libonnxruntime.so");
    std::os::unix::fs::symlink(library(), &first).unwrap();
    fs::copy(library(), folder.path().join("libother.so")).unwrap();
    let outcome = child("two requests", &first, None);
    assert_eq!(outcome.status, Status::RuntimeUnavailable as i32);
    assert!(outcome.message.contains("already uses") && outcome.message.contains("libother.so"), "{}", outcome.message);
}

#[test]
fn another_onnx_runtime_in_the_process_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let ours = folder.path().join("libonnxruntime.so");
    fs::copy(library(), &ours).unwrap();
    fs::copy(library(), folder.path().join("copy.so")).unwrap();
    let outcome = child("another first", &ours, None);
    assert_eq!(outcome.status, 0, "{}", outcome.message);
}
