//! Searches on the shipped UNet find what the PyTorch reference finds from the same batches.

mod support;
mod unets;

use std::collections::{BTreeMap, BTreeSet};

use macula::diffusion::unet::Conditioning;
use macula::discovery::search::{Bound, Found, Method, search};
use macula::discovery::{Batch, GradientOptions, KeyValueGradient};
use macula::progress::CancelToken;
use macula::runtime::{Runtime, RuntimeOptions};
use sha2::{Digest, Sha256};
use unets::Stored;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji/onnx/unet/model.onnx");
const SHAPE: [usize; 3] = [3, 32, 32];

struct Reference(BTreeMap<String, Stored>);

impl Reference {
    fn of(scope: &str) -> Self {
        // Named by the model, too, so that another one is asked anew.
        let model = std::fs::read(MODEL).unwrap();
        let version: String = Sha256::digest(model).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Self(unets::tensors(&support::fixture("discovery.py", &[scope, &version]).join("batches.safetensors")))
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.0[name].data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn i64s(&self, name: &str) -> Vec<i64> {
        self.0[name].data.as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()
    }

    fn batch(&self, at: usize) -> Batch {
        let of = |name: &str| format!("{at}.{name}");
        let text = &self.0[&of("text")];
        Batch {
            states: self.f32s(&of("state")),
            timesteps: self.i64s(&of("timestep")),
            targets: self.f32s(&of("v")),
            weights: self.f32s(&of("weight")),
            conditioning: Conditioning {
                batch: text.shape[0],
                tokens: text.shape[1],
                context: self.f32s(&of("text")),
                class_labels: Some(self.i64s(&of("labels"))),
                ..Conditioning::default()
            },
            rows: self.i64s(&of("rows")).into_iter().map(|row| row as usize).collect(),
        }
    }

    fn batches(&self) -> Vec<Batch> {
        (0..).take_while(|at| self.0.contains_key(&format!("{at}.state"))).map(|at| self.batch(at)).collect()
    }

    fn set(&self, name: &str) -> BTreeSet<usize> {
        self.i64s(name).into_iter().map(|index| index as usize).collect()
    }
}

fn open(batch: &Batch, lot: usize) -> KeyValueGradient {
    support::onnxruntime();
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let mut options = GradientOptions { lot, ..GradientOptions::default() };
    options.session.intra_threads = 1;
    KeyValueGradient::open(&runtime, MODEL, batch, SHAPE, &options, &CancelToken::new()).unwrap()
}

/// The largest difference over the largest entry.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    found.iter().zip(expected).fold(0f32, |error, (a, b)| error.max((a - b).abs())) / largest
}

fn jaccard(found: &Found, expected: &BTreeSet<usize>) -> f64 {
    let found: BTreeSet<usize> = found.shut.iter().enumerate().filter(|(_, shut)| **shut).map(|(at, _)| at).collect();
    found.intersection(expected).count() as f64 / found.union(expected).count() as f64
}

fn agrees_with_the_reference(scope: &str) {
    let reference = Reference::of(scope);
    let batches = reference.batches();
    let cancel = CancelToken::new();
    let gradient = open(&batches[0], 0);
    let ones = vec![1f32; gradient.len()];
    for (name, scales) in [("slope", &ones), ("mixed", &reference.f32s("scales"))] {
        let slope = gradient.slope(&batches[0], SHAPE, scales, &cancel).unwrap();
        let expected = f64::from(reference.f32s(&format!("{name}_loss"))[0]);
        assert!((slope.loss - expected).abs() <= 1e-5 * expected, "{scope} {name}: {} for {expected}", slope.loss);
        let error = relative(&slope.scales, &reference.f32s(name));
        println!("{scope} {name}: {error:.1e}");
        assert!(error <= 1e-4, "{scope} {name}: {error:.1e}");
    }
    // In lots of one state the sums are the same but for rounding.
    let halves = open(&batches[0], 1).slope(&batches[0], SHAPE, &ones, &cancel).unwrap();
    assert!(relative(&halves.scales, &reference.f32s("slope")) <= 1e-4);

    let count = gradient.len();
    let mut loss = |scales: &[f32], number: usize| gradient.slope(&batches[number], SHAPE, scales, &cancel);
    let share = |density: f64| Bound::Count((density * count as f64).round() as usize);
    let found = search(&mut loss, count, batches.len(), Method::Algorithm1 { rho: 0.0 }, share(0.002)).unwrap();
    let expected = f64::from(reference.f32s("agreement")[0]);
    assert!((found.agreement - expected).abs() <= 1e-3, "{} for {expected}", found.agreement);
    let same = jaccard(&found, &reference.set("saliency"));
    println!("{scope} saliency: Jaccard {same:.4}");
    assert!(same >= 0.98, "{scope} saliency: Jaccard {same}");
    let method = Method::LearntMask { rate: 0.2, penalty: 0.0 };
    let found = search(&mut loss, count, batches.len(), method, share(0.01)).unwrap();
    let same = jaccard(&found, &reference.set("learnt"));
    println!("{scope} learnt mask: Jaccard {same:.4}");
    assert!(same >= 0.98, "{scope} learnt mask: Jaccard {same}");
}

#[test]
fn a_set_for_the_rows_of_its_own_words_is_the_references() {
    agrees_with_the_reference("local");
}

#[test]
fn a_set_for_all_rows_is_the_references() {
    agrees_with_the_reference("global");
}
