//! What it costs to switch concepts, to keep them in files, and to encode a new prompt, at the size of Stable Diffusion
//! 1.x (32 projections, 19,169,280 weights) and with weights made from a seed.
//!
//! Prints one JSON object a line: `name`, `value`, `bound`, `note`. Times are the least of many runs on two threads.

mod support;

use std::time::Instant;

use macula::concept::{
    Composition, Concept, GatheredConcept, Held, Indices, KeysValues, Layer, Metadata, NeuronSet, Output,
    ProjectionWeights, Projections, Rows, Weights,
};
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use rayon::{ThreadPool, ThreadPoolBuilder};
use support::{Outcome, figure, uniform};

const CONTEXT: usize = 768;
const TOKENS: usize = 77;
const BATCH: usize = 2;

fn main() -> Outcome {
    let pool = ThreadPoolBuilder::new().num_threads(2).build()?;
    let base = base()?;
    files(&base)?;
    swaps(&base, &pool)
}

/// Milliseconds of the fastest of `runs` runs.
fn fastest_ms(runs: usize, mut run: impl FnMut() -> Outcome) -> Outcome<f64> {
    let mut fastest = f64::INFINITY;
    for _ in 0..runs {
        let start = Instant::now();
        run()?;
        fastest = fastest.min(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(fastest)
}

fn base() -> Outcome<Projections> {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let widths = [[320; 5].as_slice(), &[640; 5], &[1280; 6]].concat();
    let mut projections = Vec::new();
    for (layer, out_features) in widths.into_iter().enumerate() {
        for kind in ["to_k", "to_v"] {
            let weights = (0..out_features * CONTEXT).map(|_| uniform(&mut random) / 16.0).collect();
            projections.push(ProjectionWeights {
                path: format!("down_blocks.0.attentions.0.transformer_blocks.{layer:02}.attn2.{kind}"),
                out_features,
                in_features: CONTEXT,
                weights: Weights::F32(weights),
                bias: None,
            });
        }
    }
    Ok(Projections::new(projections)?)
}

/// A concept that holds each weight with probability `density`, or, `clustered`, whole runs of eight weights.
fn concept(base: &Projections, density: f64, clustered: bool, seed: u64) -> Outcome<Concept> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut layers = Vec::new();
    for projection in base.as_slice() {
        let weights = (projection.out_features * CONTEXT) as u32;
        let mut holds = || f64::from(random.next_u32()) < density * 2f64.powi(32);
        let members = if clustered {
            (0..weights).step_by(8).filter(|_| holds()).flat_map(|first| first..(first + 8).min(weights)).collect()
        } else {
            (0..weights).filter(|_| holds()).collect()
        };
        let indices = Indices::from_sorted(weights, members)?;
        layers.push(Layer::new(projection.path.clone(), projection.out_features, CONTEXT, indices)?);
    }
    let metadata = Metadata::new(base.fingerprint(), "random", "stable-diffusion-v1/concept-neurons");
    Ok(Concept { metadata, neurons: NeuronSet::new(layers)?, values: None, token: None })
}

/// Size and reading speed of concept files over densities; the worst of each counts.
fn files(base: &Projections) -> Outcome {
    let (mut worst_ratio, mut worst_speed) = (0f64, f64::INFINITY);
    for density in [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99] {
        for clustered in [false, true] {
            let concept = concept(base, density, clustered, 1)?;
            let bytes = concept.to_bytes()?;
            let header = u64::from_le_bytes(bytes[..8].try_into()?) as usize;
            let ratio = (bytes.len() - 8 - header) as f64 * 8.0 / concept.neurons.entropy_bits();
            let ms = fastest_ms(10, || {
                let read = Concept::from_bytes(&bytes)?;
                assert_eq!(read.neurons.len(), concept.neurons.len());
                Ok(())
            })?;
            let speed = concept.neurons.len() as f64 / 1e6 / (ms / 1e3);
            eprintln!(
                "density {:.4}{}: {} bytes, {ratio:.3} of the entropy bound, {speed:.0} million indices a second",
                concept.neurons.density(),
                if clustered { " in runs" } else { "" },
                bytes.len()
            );
            worst_ratio = worst_ratio.max(ratio);
            worst_speed = worst_speed.min(speed);
        }
    }
    figure("concept_bits_ratio", worst_ratio, "<= 1.3", "worst of 16 densities from 0.1 %, random and in runs");
    figure(
        "concept_decode_mindex_s",
        worst_speed,
        ">= 50",
        "worst of the same; whole files on one thread, hash checked",
    );
    Ok(())
}

/// The buffers that a session would be bound to.
struct Bound {
    buffers: Vec<Vec<f32>>,
    held: Held,
}

impl Bound {
    fn new(prompt: &KeysValues) -> Self {
        Self { buffers: prompt.base().to_vec(), held: Held::default() }
    }

    fn write(&mut self, concepts: &[(GatheredConcept, Rows)], prompt: &KeysValues, pool: &ThreadPool) -> Outcome {
        let mut composition = Composition::new();
        for (concept, rows) in concepts {
            composition.push(concept.clone(), 1.0, rows.clone())?;
        }
        let mut outputs: Vec<_> = self.buffers.iter_mut().map(|buffer| Output::F32(buffer)).collect();
        composition.write(prompt, &mut outputs, &mut self.held, pool)?;
        Ok(())
    }
}

fn swaps(base: &Projections, pool: &ThreadPool) -> Outcome {
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let context: Vec<f32> = (0..BATCH * TOKENS * CONTEXT).map(|_| uniform(&mut random)).collect();
    let prompt = base.keys_values(&context, BATCH, TOKENS, pool)?;
    let ms = fastest_ms(10, || {
        base.keys_values(&context, BATCH, TOKENS, pool)?;
        Ok(())
    })?;
    figure("new_prompt_ms_sd15", ms, "", "base keys and values of a prompt, 77 tokens, batch 2");

    let concepts: Vec<Concept> = (0..4).map(|seed| concept(base, 0.01, false, 10 + seed)).collect::<Outcome<_>>()?;
    let gathered: Vec<GatheredConcept> =
        concepts.iter().map(|concept| GatheredConcept::new(concept, base, pool)).collect::<Result<_, _>>()?;
    let global: Vec<_> = gathered.iter().map(|concept| (concept.clone(), Rows::All)).collect();
    let local = |first: usize| -> Vec<_> {
        let rows = |concept| (0..3).map(|token| (1, first + 4 * concept + token)).collect();
        gathered.iter().enumerate().map(|(number, concept)| (concept.clone(), Rows::Only(rows(number)))).collect()
    };

    let mut bound = Bound::new(&prompt);
    let ms = fastest_ms(200, || bound.write(&global, &prompt, pool))?;
    figure("swap_ms_sd15", ms, "<= 10", "four concepts of 1 %, global, 77 tokens, batch 2");

    // In turn at two places of the prompt, so that each swap also restores the rows of the one before.
    let places = [local(5), local(30)];
    let mut turn = 0;
    bound.write(&places[1], &prompt, pool)?;
    let ms = fastest_ms(400, || {
        turn += 1;
        bound.write(&places[turn % 2], &prompt, pool)
    })?;
    figure("swap_local_ms_sd15", ms, "<= 1", "the same, each on three tokens of its own");

    let folder = tempfile::tempdir()?;
    let mut fastest = f64::INFINITY;
    for run in 0..20 {
        let paths: Vec<_> = (0..4).map(|number| folder.path().join(format!("{run}-{number}.safetensors"))).collect();
        for (path, concept) in paths.iter().zip(&concepts) {
            concept.save(path)?;
        }
        let once = fastest_ms(1, || {
            let mut gathered = Vec::new();
            for path in &paths {
                gathered.push((GatheredConcept::new(&Concept::load(path)?, base, pool)?, Rows::All));
            }
            bound.write(&gathered, &prompt, pool)
        })?;
        fastest = fastest.min(once);
    }
    figure("swap_first_ms_sd15", fastest, "<= 40", "from four files never read before to keys and values");
    Ok(())
}
