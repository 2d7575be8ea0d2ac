//! Memory that can't be had is a status: in each of these jobs, every allocation of more than 64 KiB fails in turn.
//!
//! Only what this library allocates is meant. ONNX Runtime has an allocator of its own; the crates that parse tokenizers,
//! compress PNG files and multiply dense matrices end the process, as small allocations in Rust do. An allocation that is not prepared for failure ends the process too, so each job
//! is a child: this program again, at one ignored test. Long; under `MACULA_FULL_TESTS`.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use macula::concept::{
    Composition, Concept, Fingerprint, GatheredConcept, Held, Indices, Layer, Metadata, NeuronSet, Output,
    ProjectionWeights, Projections, Rows, Weights,
};
use macula::diffusion::pipeline::{DrawOptions, Images, Pipeline, Start};
use macula::diffusion::unet::UnetOptions;
use macula::onnx::proto::{GraphProto, ModelProto, OperatorSetIdProto, TensorProto};
use macula::onnx::{self, Limits, Model, SaveOptions};
use macula::progress::Job;
use macula::runtime::{Runtime, RuntimeOptions};
use macula::{Error, Status};
use prost::Message;

const JOB: &str = "MACULA_TEST_JOB";
const LARGE: usize = 64 << 10;
/// No allocation fails.
const NONE: usize = usize::MAX;

/// Large allocations that are still granted before one fails.
static GRANTED: AtomicUsize = AtomicUsize::new(NONE);

struct Failing;

// SAFETY: passes everything on to the system's allocator, or answers NULL, which means that there is no memory.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let takes = |granted: usize| (granted != NONE).then(|| granted.wrapping_sub(1));
        if layout.size() > LARGE
            && GRANTED.fetch_update(Ordering::SeqCst, Ordering::SeqCst, takes).is_ok_and(|granted| granted == 0)
        {
            // From 0 down to `NONE`: the next ones are granted again.
            if std::env::var_os("MACULA_TEST_BACKTRACE").is_some() {
                eprintln!("{} bytes refused at\n{}", layout.size(), std::backtrace::Backtrace::force_capture());
            }
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Failing = Failing;

/// Runs the job with no failure, then with the first, second, third... large allocation failing until none is left.
/// Gives how many there were.
fn each_fails<T: PartialEq>(mut job: impl FnMut() -> Result<T, Error>) -> usize {
    let expected = job().unwrap();
    for number in 0.. {
        // The last line before a process that ends itself.
        eprintln!("allocation {number}");
        GRANTED.store(number, Ordering::SeqCst);
        let outcome = job();
        let reached = GRANTED.swap(NONE, Ordering::SeqCst) == NONE;
        match outcome {
            Ok(found) => assert!(found == expected, "allocation {number} failed and the result is another one"),
            Err(error) => assert_eq!(error.status(), Status::OutOfMemory, "allocation {number}: {error}"),
        }
        if !reached {
            return number;
        }
        assert!(job().is_ok_and(|found| found == expected), "after allocation {number} failed");
    }
    unreachable!()
}

const FEATURES: usize = 1024;

fn base() -> Projections {
    let projection = |path: &str| ProjectionWeights {
        path: path.into(),
        out_features: FEATURES,
        in_features: FEATURES,
        weights: Weights::F32((0..FEATURES * FEATURES).map(|i| (i % 97) as f32 / 97.0).collect()),
        bias: None,
    };
    Projections::new(vec![projection("a.attn2.to_k"), projection("a.attn2.to_v")]).unwrap()
}

/// Every `stride`th weight.
fn concept(base: Fingerprint, stride: usize) -> Concept {
    let weights = (FEATURES * FEATURES) as u32;
    let layers = ["a.attn2.to_k", "a.attn2.to_v"].map(|path| {
        let indices = Indices::from_sorted(weights, (0..weights).step_by(stride).collect()).unwrap();
        Layer::new(path, FEATURES, FEATURES, indices).unwrap()
    });
    Concept {
        metadata: Metadata::new(base, "a test", "test"),
        neurons: NeuronSet::new(layers.into()).unwrap(),
        values: None,
        token: None,
    }
}

fn files() -> usize {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("concept.safetensors");
    let concept = concept(base().fingerprint(), 7);
    each_fails(|| {
        concept.save(&path)?;
        let read = Concept::load(&path)?;
        read.to_bytes()
    })
}

fn algebra() -> usize {
    let base = base();
    let (a, b) = (concept(base.fingerprint(), 7).neurons, concept(base.fingerprint(), 5).neurons);
    each_fails(|| {
        let (both, either) = (a.intersection(&b)?, a.union(&b)?);
        Ok((a.difference(&b)?.len(), both.len(), either.len(), a.overlap(&b)?.total.jaccard().to_bits()))
    })
}

fn composing() -> usize {
    let base = base();
    let concept = concept(base.fingerprint(), 7);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let context: Vec<f32> = (0..77 * FEATURES).map(|i| (i % 89) as f32 / 89.0).collect();
    // The dense products, whose crate packs them in memory of its own.
    let prompt = base.keys_values(&context, 1, 77, &pool).unwrap();
    each_fails(|| {
        let gathered = GatheredConcept::new(&concept, &base, &pool)?;
        let mut composition = Composition::new();
        composition.push(gathered, 0.5, Rows::All)?;
        let mut buffers = Vec::new();
        for values in prompt.base() {
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(values.len())?;
            buffer.extend_from_slice(values);
            buffers.push(buffer);
        }
        let mut outputs: Vec<_> = buffers.iter_mut().map(|buffer| Output::F32(buffer)).collect();
        composition.write(&prompt, &mut outputs, &mut Held::default(), &pool)?;
        Ok(buffers[1][76 * FEATURES].to_bits())
    })
}

fn models() -> usize {
    let folder = tempfile::tempdir().unwrap();
    let tensor = |name: &str| TensorProto {
        name: Some(name.into()),
        data_type: Some(1),
        dims: vec![256, 256],
        raw_data: Some(vec![1; 256 * 256 * 4].into()),
        ..TensorProto::default()
    };
    let opset = OperatorSetIdProto { version: Some(17), ..OperatorSetIdProto::default() };
    let graph = GraphProto {
        name: Some("weights".into()),
        initializer: vec![tensor("a"), tensor("b")],
        ..GraphProto::default()
    };
    let model =
        ModelProto { ir_version: Some(8), opset_import: vec![opset], graph: Some(graph), ..ModelProto::default() };
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    each_fails(|| {
        let mut read = 0;
        for (number, weights) in
            [onnx::Weights::Inline, onnx::Weights::OneFile(None), onnx::Weights::FileEach("w".into())]
                .into_iter()
                .enumerate()
        {
            let mut options = SaveOptions::default();
            options.weights = weights;
            let copy = folder.path().join(format!("{number}.onnx"));
            Model::open(&path, &Limits::default())?.save(&copy, &options)?;
            let copy = Model::open(&copy, &Limits::default())?;
            read += copy.initializer("b")?.read()?.len() + copy.for_session()?.bytes.len();
        }
        Ok(read)
    })
}

fn pictures() -> usize {
    let planes: Vec<f32> = (0..3 * 256 * 256).map(|i| (i % 255) as f32 / 127.5 - 1.0).collect();
    each_fails(|| {
        let images = Images::from_planes(&planes, [1, 3, 256, 256])?;
        Ok(images.to_planes()?[7].to_bits())
    })
}

fn drawing() -> usize {
    support::onnxruntime();
    let folder = support::fixture("pipelines.py", &["pixel"]).join("model");
    let mut options = UnetOptions::default();
    options.session.intra_threads = 1;
    options.threads = 1;
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let mut pipeline = Pipeline::open(&runtime, folder, &options).unwrap();
    let mut draw = DrawOptions::new("a photo of a red cat");
    // Many, so that states are large, and small, so that the model is quick.
    draw.images_per_prompt = 32;
    (draw.width, draw.height) = (Some(16), Some(16));
    draw.steps = 2;
    let rgb = (0..16 * 16 * 3).map(|i| (i % 251) as u8).collect();
    let images = Images { count: 1, height: 16, width: 16, rgb };
    draw.start = Start::Images { images: &images, step: 0 };
    each_fails(|| pipeline.draw(&draw, None, &mut Job::default()))
}

/// Name, and what it does; answers how many large allocations were failed.
type Task = (&'static str, fn() -> usize);

const JOBS: [Task; 6] = [
    ("files", files),
    ("algebra", algebra),
    ("composing", composing),
    ("models", models),
    ("pictures", pictures),
    ("drawing", drawing),
];

#[test]
#[ignore = "one job of the other test, in a process of its own"]
fn child_process() {
    let Ok(name) = std::env::var(JOB) else { return };
    let (_, job) = JOBS.into_iter().find(|(known, _)| *known == name).unwrap();
    println!("{name}: {} large allocations", job());
}

#[test]
fn memory_that_can_not_be_had_is_a_status() {
    if std::env::var_os("MACULA_FULL_TESTS").is_none_or(|value| value != "1") {
        return;
    }
    let program: PathBuf = std::env::current_exe().unwrap();
    for (name, _) in JOBS {
        let mut child = Command::new(&program);
        child.args(["--exact", "child_process", "--ignored", "--nocapture", "--test-threads=1"]).env(JOB, name);
        let output = child.output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{name}: {}\n{out}\n{err}", output.status);
        let line = out.lines().find(|line| line.ends_with("large allocations"));
        println!("{}", line.unwrap_or_else(|| panic!("{name} did not run: {out}")));
    }
}
