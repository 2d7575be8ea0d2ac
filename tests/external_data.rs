//! Hostile models: external data that leads elsewhere, files that change, and bombs. No byte outside the model's folder
//! may be read, nothing may signal, and every answer is a status within a second.

use std::ffi::CString;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use macula::Status;
use macula::onnx::build::{node, tensor_f32, tensor_i64, value};
use macula::onnx::proto::tensor_proto::DataLocation;
use macula::onnx::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, SparseTensorProto,
    StringStringEntryProto, TensorProto, TrainingInfoProto, attribute_proto::AttributeType,
};
use macula::onnx::{DataType, Limits, Model};
use prost::Message;

const MARKER: &[u8; 16] = b"THE MARKER FILE!";

fn full() -> bool {
    std::env::var_os("MACULA_FULL_TESTS").is_some_and(|value| value == "1")
}

/// Four f32 at `location`.
fn external(entries: &[(&str, &str)]) -> TensorProto {
    let entry =
        |(key, value): &(&str, &str)| StringStringEntryProto { key: Some((*key).into()), value: Some((*value).into()) };
    TensorProto {
        name: Some("w".into()),
        dims: vec![4],
        data_type: Some(DataType::Float as i32),
        external_data: entries.iter().map(entry).collect(),
        data_location: Some(DataLocation::External as i32),
        ..TensorProto::default()
    }
}

fn plain_model() -> ModelProto {
    let graph = GraphProto {
        name: Some("attack".into()),
        input: vec![value("x", DataType::Float, Some(&[4.into()]))],
        output: vec![value("y", DataType::Float, Some(&[4.into()]))],
        node: vec![node("Neg", ["x"], ["y"])],
        ..GraphProto::default()
    };
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(17) }],
        graph: Some(graph),
        ..ModelProto::default()
    }
}

fn sparse(values: TensorProto, indices: TensorProto) -> SparseTensorProto {
    SparseTensorProto { values: Some(values), indices: Some(indices), dims: vec![16] }
}

fn attribute(change: impl FnOnce(&mut AttributeProto), kind: AttributeType) -> NodeProto {
    let mut attribute =
        AttributeProto { name: Some("value".into()), r#type: Some(kind as i32), ..AttributeProto::default() };
    change(&mut attribute);
    NodeProto { attribute: vec![attribute], ..node("Constant", [], ["c"]) }
}

/// A model that names its external tensor in one of the places where a tensor can be.
type Position = (&'static str, fn(TensorProto) -> ModelProto);

fn positions() -> Vec<Position> {
    fn with(change: impl FnOnce(&mut GraphProto)) -> ModelProto {
        let mut model = plain_model();
        change(model.graph.as_mut().unwrap());
        model
    }
    fn inner(tensor: TensorProto) -> GraphProto {
        GraphProto {
            name: Some("inner".into()),
            node: vec![attribute(|a| a.t = Some(tensor), AttributeType::Tensor)],
            output: vec![value("c", DataType::Float, None)],
            ..GraphProto::default()
        }
    }
    fn function(change: impl FnOnce(&mut FunctionProto)) -> ModelProto {
        let mut function = FunctionProto {
            name: Some("f".into()),
            domain: Some("local".into()),
            output: vec!["c".into()],
            node: vec![attribute(|a| a.t = Some(tensor_f32("", &[1], &[0.0])), AttributeType::Tensor)],
            ..FunctionProto::default()
        };
        change(&mut function);
        ModelProto { functions: vec![function], ..plain_model() }
    }
    fn training(initialization: Option<GraphProto>, algorithm: Option<GraphProto>) -> ModelProto {
        let training = TrainingInfoProto { initialization, algorithm, ..TrainingInfoProto::default() };
        ModelProto { training_info: vec![training], ..plain_model() }
    }
    vec![
        ("initializer", |t| with(|g| g.initializer.push(t))),
        ("sparse values", |t| with(|g| g.sparse_initializer.push(sparse(t, tensor_i64("i", &[4], &[0, 1, 2, 3]))))),
        ("sparse indices", |mut t| {
            t.data_type = Some(DataType::Int64 as i32);
            t.dims = vec![2];
            with(|g| g.sparse_initializer.push(sparse(tensor_f32("s", &[2], &[0.0; 2]), t)))
        }),
        ("attribute", |t| with(|g| g.node.push(attribute(|a| a.t = Some(t), AttributeType::Tensor)))),
        ("attribute list", |t| with(|g| g.node.push(attribute(|a| a.tensors.push(t), AttributeType::Tensors)))),
        ("sparse attribute", |t| {
            let sparse = sparse(t, tensor_i64("i", &[4], &[0, 1, 2, 3]));
            with(|g| g.node.push(attribute(|a| a.sparse_tensor = Some(sparse), AttributeType::SparseTensor)))
        }),
        ("subgraph", |t| with(|g| g.node.push(attribute(|a| a.g = Some(inner(t)), AttributeType::Graph)))),
        ("subgraph list", |t| with(|g| g.node.push(attribute(|a| a.graphs.push(inner(t)), AttributeType::Graphs)))),
        ("function", |t| function(|f| f.node[0].attribute[0].t = Some(t))),
        ("function default", |t| {
            let default = AttributeProto {
                name: Some("d".into()),
                r#type: Some(AttributeType::Tensor as i32),
                t: Some(t),
                ..AttributeProto::default()
            };
            function(|f| f.attribute_proto.push(default))
        }),
        ("training start", |t| training(Some(inner(t)), None)),
        ("training step", |t| training(None, Some(inner(t)))),
    ]
}

/// Tells whether a file was opened or read.
struct Watch(OwnedFd);

impl Watch {
    fn new(path: &Path) -> Self {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: plain calls on a descriptor that this test owns and a string that outlives them.
        unsafe {
            let fd = libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC);
            assert!(fd >= 0 && libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_OPEN | libc::IN_ACCESS) >= 0);
            Self(OwnedFd::from_raw_fd(fd))
        }
    }

    fn was_touched(&self) -> bool {
        use std::io::Read;
        let mut events = [0; 4096];
        matches!(fs::File::from(self.0.try_clone().unwrap()).read(&mut events), Ok(count) if count > 0)
    }
}

/// `base/secret/marker` outside, and `base/model/` with every kind of trap in it.
struct Trap {
    base: tempfile::TempDir,
    _socket: std::os::unix::net::UnixListener,
}

impl Trap {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let (secret, model) = (base.path().join("secret"), base.path().join("model"));
        fs::create_dir_all(&secret).unwrap();
        fs::create_dir_all(model.join("folder")).unwrap();
        fs::create_dir_all(base.path().join("model-evil")).unwrap();
        let marker = secret.join("marker");
        fs::write(&marker, MARKER).unwrap();
        fs::write(model.join("good"), [1u8; 16]).unwrap();
        fs::write(model.join("short"), [1u8; 15]).unwrap();
        fs::write(base.path().join("model-evil/marker"), MARKER).unwrap();
        symlink(&marker, model.join("link")).unwrap();
        symlink("../secret/marker", model.join("relative_link")).unwrap();
        symlink("../model-evil/marker", model.join("neighbour")).unwrap();
        symlink(&secret, model.join("linked_parent")).unwrap();
        symlink("loop", model.join("loop")).unwrap();
        symlink("nowhere", model.join("dangling")).unwrap();
        symlink("/dev/zero", model.join("device_link")).unwrap();
        symlink("good", model.join("inside_link")).unwrap();
        fs::hard_link(&marker, model.join("hard_link")).unwrap();
        let fifo = CString::new(model.join("fifo").as_os_str().as_bytes()).unwrap();
        // SAFETY: a plain call with a string that outlives it.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        let socket = std::os::unix::net::UnixListener::bind(model.join("socket")).unwrap();
        let device = CString::new(model.join("device").as_os_str().as_bytes()).unwrap();
        // SAFETY: as above. Only root may make a device; without one the location is missing, which must fail as well.
        unsafe { libc::mknod(device.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 5)) };
        Self { base, _socket: socket }
    }

    fn folder(&self) -> PathBuf {
        self.base.path().join("model")
    }

    fn marker(&self) -> PathBuf {
        self.base.path().join("secret/marker")
    }

    fn open(&self, model: &ModelProto, limits: &Limits) -> macula::Result<Model> {
        let path = self.folder().join("model.onnx");
        fs::write(&path, model.encode_to_vec()).unwrap();
        Model::open(&path, limits)
    }
}

/// Processor time of this thread: a second of it is a second on an idle machine.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid struct that outlives the call.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn no_location_leads_outside_from_any_position() {
    let trap = Trap::new();
    let marker = trap.marker();
    let long = "a/".repeat(2_000) + "good";
    let locations = [
        marker.to_str().unwrap(),
        "/dev/zero",
        "../secret/marker",
        "folder/../../secret/marker",
        "./../secret/marker",
        "folder/..",
        "..",
        "..\\secret\\marker",
        "C:\\marker",
        "C:marker",
        "\\\\?\\marker",
        "good\0.bin",
        "",
        ".",
        "folder",
        "good/",
        "good/.",
        "link",
        "relative_link",
        "neighbour",
        "linked_parent/marker",
        "loop",
        "dangling",
        "missing",
        "device_link",
        "device",
        "fifo",
        "socket",
        "hard_link",
        "short",
        "*/_ORT_MEM_ADDR_/*",
        "file:///etc/passwd",
        "~/marker",
        "$HOME/marker",
        "go\nod",
        &long,
    ];
    let watch = Watch::new(&marker);
    let mut attacks = 0;
    for (position, place) in positions() {
        let good = place(external(&[("location", "good")]));
        if let Err(error) = trap.open(&good, &Limits::default()) {
            panic!("{position}: a good file is refused: {error}");
        }
        trap.open(&place(external(&[("location", "inside_link")])), &Limits::default()).unwrap();
        for location in locations {
            let (started, worked) = (Instant::now(), thread_time());
            let error = match trap.open(&place(external(&[("location", location)])), &Limits::default()) {
                Err(error) => error,
                Ok(_) => panic!("{position}: {location:?} was accepted"),
            };
            assert!(
                matches!(error.status(), Status::InvalidFile | Status::NotFound | Status::Io | Status::LimitExceeded),
                "{position}: {location:?}: {:?} {error}",
                error.status()
            );
            assert!(thread_time() - worked < Duration::from_secs(1), "{position}: {location:?}");
            // A pipe that blocks would wait for ever; a busy machine may wait a little.
            assert!(started.elapsed() < Duration::from_secs(20), "{position}: {location:?}");
            attacks += 1;
        }
    }
    assert!(attacks >= 60, "{attacks}");
    assert!(!watch.was_touched(), "the marker was opened");
    // The watch itself works.
    fs::read(&marker).unwrap();
    assert!(watch.was_touched());
    let before = open_files();
    let attack = positions()[0].1(external(&[("location", "link")]));
    for _ in 0..1_000 {
        trap.open(&attack, &Limits::default()).unwrap_err();
    }
    // Other tests of this program may open files meanwhile; a leak would be a thousand.
    assert!(open_files() < before + 100);
}

#[test]
fn offsets_and_lengths_are_checked_without_overflow() {
    let trap = Trap::new();
    let refused: [&[(&str, &str)]; 16] = [
        &[("location", "good"), ("offset", "1")],
        &[("location", "good"), ("offset", "18446744073709551615")],
        &[("location", "good"), ("offset", "18446744073709551600"), ("length", "16")],
        &[("location", "good"), ("offset", "9223372036854775807")],
        &[("location", "good"), ("offset", "-1")],
        &[("location", "good"), ("offset", "+0")],
        &[("location", "good"), ("offset", " 0")],
        &[("location", "good"), ("offset", "0x0")],
        &[("location", "good"), ("offset", "")],
        &[("location", "good"), ("offset", "1e1")],
        &[("location", "good"), ("length", "15")],
        &[("location", "good"), ("length", "17")],
        &[("location", "good"), ("length", "-16")],
        &[("location", "good"), ("location", "link")],
        &[("location", "good"), ("offset", "0"), ("offset", "0")],
        &[("offset", "0")],
    ];
    for entries in refused {
        let model = positions()[0].1(external(entries));
        let error = trap.open(&model, &Limits::default()).expect_err(&format!("{entries:?}"));
        assert_eq!(error.status(), Status::InvalidFile, "{entries:?}: {error}");
        assert!(error.message().contains("\"w\""), "{error}");
    }
    let accepted = positions()[0].1(external(&[("location", "good"), ("offset", "0"), ("length", "16")]));
    let model = trap.open(&accepted, &Limits::default()).unwrap();
    assert_eq!(&model.initializer("w").unwrap().read().unwrap()[..], [1u8; 16]);
    for (dims, status) in [
        (vec![-4], Status::InvalidFile),
        (vec![i64::MAX, i64::MAX], Status::InvalidFile),
        (vec![i64::MIN], Status::InvalidFile),
        (vec![1 << 40], Status::LimitExceeded),
        (vec![1 << 32, 1 << 32, 0], Status::InvalidFile),
        (vec![1; 9], Status::LimitExceeded),
        (vec![5], Status::InvalidFile),
    ] {
        let tensor = TensorProto { dims: dims.clone(), ..external(&[("location", "good")]) };
        let error = trap.open(&positions()[0].1(tensor), &Limits::default()).unwrap_err();
        assert_eq!(error.status(), status, "{dims:?}: {error}");
    }
}

#[test]
fn more_folders_and_hard_links_can_be_allowed() {
    let trap = Trap::new();
    let mut limits = Limits::default();
    limits.extra_roots = vec![trap.base.path().join("secret")];
    let model = trap.open(&positions()[0].1(external(&[("location", "relative_link")])), &limits);
    assert!(model.unwrap_err().message().contains("hard links"));
    limits.hard_links = true;
    let model = trap.open(&positions()[0].1(external(&[("location", "relative_link")])), &limits).unwrap();
    assert_eq!(&model.initializer("w").unwrap().read().unwrap()[..], MARKER);
    let session = model.for_session().unwrap();
    let folder = session.folder.unwrap();
    assert_eq!(folder, fs::canonicalize(trap.base.path().join("secret")).unwrap());
    let rewritten = ModelProto::decode(session.bytes).unwrap();
    assert_eq!(rewritten.graph.unwrap().initializer[0].external_data[0].value(), "marker");
    limits.extra_roots = vec![trap.base.path().join("none")];
    let error = trap.open(&positions()[0].1(external(&[("location", "good")])), &limits).unwrap_err();
    assert_eq!(error.status(), Status::NotFound);
}

#[test]
fn a_download_cache_of_links_opens() {
    let base = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (base.path().join("blobs"), base.path().join("snapshots/main/unet"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let model = positions()[0].1(external(&[("location", "model.onnx_data")]));
    fs::write(blobs.join("0a1b"), model.encode_to_vec()).unwrap();
    fs::write(blobs.join("2c3d"), [7u8; 16]).unwrap();
    symlink("../../../blobs/0a1b", snapshot.join("model.onnx")).unwrap();
    symlink("../../../blobs/2c3d", snapshot.join("model.onnx_data")).unwrap();
    let model = Model::open(snapshot.join("model.onnx"), &Limits::default()).unwrap();
    assert_eq!(&model.initializer("w").unwrap().read().unwrap()[..], [7u8; 16]);
    // The same data by a path through a linked folder, as users of model folders have it.
    symlink(base.path().join("snapshots/main"), base.path().join("models")).unwrap();
    Model::open(base.path().join("models/unet/model.onnx"), &Limits::default()).unwrap();
}

#[test]
fn swapping_the_file_for_a_link_never_reads_the_target() {
    let rounds = if full() { 100_000 } else { 2_000 };
    let trap = Trap::new();
    let folder = trap.folder();
    let data = folder.join("swapped");
    let model = positions()[0].1(external(&[("location", "swapped")])).encode_to_vec();
    let path = folder.join("model.onnx");
    fs::write(&path, model).unwrap();
    fs::write(&data, [2u8; 16]).unwrap();
    let marker = trap.marker();
    let watch = Watch::new(&marker);
    let stop = AtomicBool::new(false);
    let (mut read, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let staged = folder.join("staged");
            while !stop.load(Ordering::Relaxed) {
                let _ = symlink(&marker, &staged);
                let _ = fs::rename(&staged, &data);
                let _ = fs::write(&staged, [2u8; 16]);
                let _ = fs::rename(&staged, &data);
            }
        });
        for _ in 0..rounds {
            let outcome = Model::open(&path, &Limits::default()).and_then(|m| m.initializer("w")?.read());
            match outcome {
                Ok(bytes) => {
                    assert_eq!(&bytes[..], [2u8; 16]);
                    read += 1;
                }
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(!watch.was_touched(), "the marker was opened");
    assert!(read > 0 && refused > 0, "the race was not run: {read} read, {refused} refused");
}

#[test]
fn files_that_change_while_they_are_read_are_errors_not_signals() {
    let trap = Trap::new();
    let path = trap.folder().join("model.onnx");
    let mut tensor = external(&[("location", "changing")]);
    tensor.dims = vec![1 << 18];
    let mut model = positions()[0].1(tensor);
    let mut filler = tensor_f32("filler", &[1 << 18], &vec![0.5; 1 << 18]);
    model.graph.as_mut().unwrap().initializer.push(std::mem::take(&mut filler));
    let model = model.encode_to_vec();
    let data = trap.folder().join("changing");
    let whole = vec![3u8; 1 << 20];
    fs::write(&path, &model).unwrap();
    fs::write(&data, &whole).unwrap();
    let stop = AtomicBool::new(false);
    let (mut sound, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                for (file, content) in [(&path, &model), (&data, &whole)] {
                    match round % 4 {
                        0 => fs::OpenOptions::new().write(true).open(file).unwrap().set_len(1000).unwrap(),
                        1 => fs::OpenOptions::new().write(true).open(file).unwrap().set_len(3 << 20).unwrap(),
                        2 => fs::write(file, content).unwrap(),
                        _ => {
                            let staged = file.with_extension("staged");
                            fs::write(&staged, content).unwrap();
                            fs::rename(&staged, file).unwrap();
                        }
                    }
                }
                std::thread::sleep(Duration::from_micros(round % 7 * 150));
            }
        });
        for _ in 0..500 {
            match Model::open(&path, &Limits::default()).and_then(|m| m.initializer("w")?.read()) {
                Ok(bytes) => {
                    assert_eq!(bytes.len(), 1 << 20);
                    sound += 1;
                }
                Err(error) => {
                    let expected = [Status::InvalidFile, Status::Io, Status::NotFound, Status::LimitExceeded];
                    assert!(expected.contains(&error.status()), "{error}");
                    refused += 1;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(refused > 0, "nothing changed while it was read: {sound} sound, {refused} refused");
}

#[test]
fn a_file_that_changed_since_it_was_checked_is_not_used() {
    let trap = Trap::new();
    let model = trap.open(&positions()[0].1(external(&[("location", "good")])), &Limits::default()).unwrap();
    model.for_session().unwrap();
    fs::write(trap.folder().join("good"), [9u8; 16]).unwrap();
    for error in [
        model.initializer("w").unwrap().read().unwrap_err(),
        model.verify_external_files().unwrap_err(),
        model.for_session().unwrap_err(),
    ] {
        assert_eq!(error.status(), Status::InvalidFile);
        assert!(error.message().contains("has changed since"), "{error}");
    }
}

fn tag(field: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    prost::encoding::encode_varint(content.len() as u64, &mut out);
    out.extend(content);
    out
}

/// Small files that ask for much.
fn bombs() -> Vec<(&'static str, Vec<u8>)> {
    fn graph(change: impl FnOnce(&mut GraphProto)) -> Vec<u8> {
        let mut model = plain_model();
        change(model.graph.as_mut().unwrap());
        model.encode_to_vec()
    }
    fn constant_op(op: &str, shape: &[i64]) -> Vec<u8> {
        let shape = tensor_i64("shape", &[shape.len()], shape);
        graph(|g| {
            g.initializer = vec![shape, tensor_f32("one", &[1], &[1.0])];
            let inputs = if op == "ConstantOfShape" { vec!["shape"] } else { vec!["one", "shape"] };
            g.node.push(node(op, inputs, ["big"]));
            g.output.push(value("big", DataType::Float, None));
        })
    }
    let mut deep = GraphProto { name: Some("d".into()), ..GraphProto::default() };
    for _ in 0..30 {
        let body = node("If", [], ["c"]).with("then_branch", deep);
        deep = GraphProto { name: Some("d".into()), node: vec![body], ..GraphProto::default() };
    }
    let mut nested = Vec::new();
    for _ in 0..5_000 {
        nested = tag(1, &tag(5, &tag(6, &nested)));
    }
    let doubling = (0..60).map(|index| {
        let (from, to) = (format!("t{index}"), format!("t{}", index + 1));
        NodeProto { input: vec![from.clone(), from], output: vec![to], ..node("Concat", [], []) }.with("axis", 0)
    });
    let doubling: Vec<NodeProto> = doubling.collect();
    let chain = |count: usize| {
        graph(|g| {
            for index in 0..count {
                g.node.push(node("Neg", ["x"], [format!("n{index}").as_str()]));
            }
        })
    };
    vec![
        ("ConstantOfShape, 287 MB", constant_op("ConstantOfShape", &[71_750_000])),
        ("ConstantOfShape, 2^126", constant_op("ConstantOfShape", &[i64::MAX, i64::MAX])),
        ("Expand", constant_op("Expand", &[1 << 33])),
        ("Tile", constant_op("Tile", &[1 << 33])),
        ("doubling", {
            graph(|g| {
                g.initializer.push(tensor_f32("t0", &[1], &[1.0]));
                g.output.push(value("t60", DataType::Float, None));
                g.node.extend(doubling);
            })
        }),
        ("sparse", {
            graph(|g| {
                let mut sparse = sparse(tensor_f32("s", &[1], &[1.0]), tensor_i64("i", &[1], &[0]));
                sparse.dims = vec![1 << 34];
                g.sparse_initializer.push(sparse);
            })
        }),
        ("declared initializer", {
            graph(|g| {
                let dims = vec![1 << 33];
                g.initializer.push(TensorProto { dims, ..tensor_f32("w", &[1], &[1.0]) });
            })
        }),
        ("empty nodes", tag(7, &tag(1, &[]).repeat(500_000))),
        ("empty tensors", tag(7, &tag(5, &[]).repeat(500_000))),
        ("empty attributes", tag(7, &tag(1, &tag(5, &[]).repeat(500_000)))),
        ("empty strings", tag(7, &tag(1, &tag(1, &[]).repeat(1_000_000)))),
        ("subgraphs", graph(|g| g.node.push(node("If", [], ["c"]).with("then_branch", deep)))),
        ("messages", tag(7, &nested)),
        ("rank", graph(|g| g.initializer.push(tensor_f32("w", &[1; 5_000], &[1.0])))),
        ("long name", graph(|g| g.node[0].name = Some("n".repeat(1 << 20)))),
        ("nodes", {
            let mut bytes = chain(20_000);
            bytes.extend(tag(7, &tag(1, &[])).repeat(300_000));
            bytes
        }),
    ]
}

/// The child of the test below, which runs it with limits on memory and time.
#[test]
fn bomb_child() {
    let Some(path) = std::env::var_os("MACULA_TEST_BOMB") else { return };
    let memory = |field: &str| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    };
    let baseline = memory("VmHWM:");
    let space = memory("VmSize:") + (192 << 20);
    for (resource, limit) in [(libc::RLIMIT_AS, space), (libc::RLIMIT_CPU, 5)] {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: `limit` is a valid struct that outlives the call.
        assert_eq!(unsafe { libc::setrlimit(resource, &limit) }, 0);
    }
    let started = thread_time();
    let outcome = Model::open(PathBuf::from(path), &Limits::default());
    let elapsed = thread_time() - started;
    let grown = memory("VmHWM:").saturating_sub(baseline);
    let status = outcome.as_ref().err().map(|error| error.status());
    println!("bomb: {status:?} in {elapsed:?}, {} KiB more", grown >> 10);
    let error = outcome.expect_err("the bomb was accepted");
    assert!(matches!(status, Some(Status::LimitExceeded | Status::InvalidFile)), "{error}");
    assert!(elapsed < Duration::from_secs(1), "{elapsed:?}: {error}");
    assert!(grown < 64 << 20, "{} MiB: {error}", grown >> 20);
}

#[test]
fn bombs_are_refused_in_a_second_and_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    for (index, (name, bytes)) in bombs().into_iter().enumerate() {
        let path = folder.path().join(format!("bomb{index}.onnx"));
        fs::write(&path, bytes).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "bomb_child", "--nocapture", "--test-threads=1"])
            .env("MACULA_TEST_BOMB", &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let line = said.lines().find(|line| line.contains("bomb: ")).unwrap_or("no answer");
        println!("{name}: {line}");
        assert!(output.status.success(), "{name}: {said}{}", String::from_utf8_lossy(&output.stderr));
    }
}
