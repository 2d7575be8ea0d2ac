//! The graphical C++ host: built against an installed tree, and used with mouse and keyboard on a screen of its own. What
//! it shows is held against what the library draws, and its frames against the time that they may take.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
#[path = "support/install.rs"]
mod install;
#[path = "support/screen.rs"]
mod screen;
mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use image::RgbImage;
use install::{text, tool};
use screen::{Screen, drawn, wait_for};

const PROMPT: &str = "a <s1> apple on a blue background";
const STEPS: u32 = 10;
const GUIDANCE: f64 = 4.0;
/// The most milliseconds from one frame to the next while a picture is drawn.
const LONGEST_FRAME: f64 = 50.0;

/// Milliseconds from frame to frame during one activity.
#[derive(Clone, Copy)]
struct Frames {
    count: f64,
    longest: f64,
    mean: f64,
}

/// What the program's trace has said until now.
#[derive(Default)]
struct Said {
    places: HashMap<String, [i32; 4]>,
    values: HashMap<String, String>,
    facts: HashMap<String, String>,
    frames: Vec<(String, Frames)>,
    /// The progress of all draws, a (done, total) a line.
    course: Vec<(u64, u64)>,
}

struct Studio {
    screen: Screen,
    program: Child,
    said: Arc<Mutex<Said>>,
}

impl Studio {
    fn start(program: &Path, pictures: &Path) -> Self {
        let screen = Screen::start(1280, 800);
        let mut command = screen.command(program);
        // The library finds the ONNX Runtime that was installed with it.
        command.env_remove("MACULA_ONNXRUNTIME").env("HOME", pictures).current_dir(pictures);
        command.args(["--trace", "--pictures", text(pictures)]).stdout(Stdio::piped());
        let mut program = command.spawn().unwrap();
        let said = Arc::new(Mutex::new(Said::default()));
        let (lines, heard) = (BufReader::new(program.stdout.take().unwrap()), said.clone());
        std::thread::spawn(move || lines.lines().for_each(|line| heard.lock().unwrap().hear(&line.unwrap())));
        let studio = Self { screen, program, said };
        studio.place("model");
        // There is no window manager to give it the keys.
        let window = studio.screen.act(&["search", "--name", "^Macula Studio$"]);
        studio.screen.focus(window.lines().last().unwrap());
        studio
    }

    fn fact(&self, name: &str) -> String {
        self.said.lock().unwrap().facts.get(name).cloned().unwrap_or_default()
    }

    fn place(&self, name: &str) -> [i32; 4] {
        wait_for(name, 10, || self.said.lock().unwrap().places.get(name).copied())
    }

    fn click(&self, name: &str) {
        let [x0, y0, x1, y1] = self.place(name);
        self.screen.click([(x0 + x1) / 2, (y0 + y1) / 2]);
    }

    /// Does something with the mouse or the keys until the widget has the value. The program reads both once a frame, so
    /// each try leaves it more time for one.
    fn until_it_is(&self, name: &str, value: &str, try_it: impl Fn(&str)) {
        for pause in ["0.06", "0.2", "0.5", "1", "1"] {
            try_it(pause);
            let end = Instant::now() + Duration::from_secs(2);
            while Instant::now() < end {
                if self.said.lock().unwrap().values.get(name).is_some_and(|entered| entered == value) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        panic!("{name} is {:?}, not {value:?}", self.said.lock().unwrap().values.get(name));
    }

    /// Writes into a field in place of what is there.
    fn enter(&self, name: &str, text: &str) {
        self.until_it_is(name, text, |pause| {
            self.click(name);
            self.screen.act(&[
                "keydown", "ctrl", "sleep", pause, "keydown", "a", "sleep", pause, "keyup", "a", "keyup", "ctrl",
            ]);
            self.screen.type_text(text);
        });
    }

    /// Types a number into a slider, which becomes a field by a click with Ctrl.
    fn set(&self, name: &str, number: u32) {
        self.until_it_is(name, &number.to_string(), |pause| {
            self.screen.act(&["keydown", "ctrl", "sleep", pause]);
            self.click(name);
            self.screen.act(&["sleep", pause, "keyup", "ctrl", "sleep", pause]);
            self.screen.type_text(&number.to_string());
            self.screen.act(&["sleep", pause, "keydown", "Return", "sleep", pause, "keyup", "Return"]);
        });
    }

    /// Drags a slider's grab from one end to the other.
    fn drag(&self, name: &str, to_the_right: bool) {
        let [x0, y0, x1, y1] = self.place(name);
        let (from, to) = if to_the_right { (x0 + 9, x1) } else { (x1 - 9, x0) };
        let [from, to, y] = [from, to, (y0 + y1) / 2].map(|at| at.to_string());
        self.until_it_is(name, if to_the_right { "1.000000" } else { "0.000000" }, |pause| {
            self.screen.act(&["mousemove", &from, &y, "sleep", pause, "mousedown", "1", "sleep", pause]);
            self.screen.act(&["mousemove", &to, &y, "sleep", pause, "mouseup", "1", "sleep", pause]);
        });
    }

    fn rests(&self, seconds: u64) {
        wait_for("rest", seconds, || (self.fact("activity") == "idle").then_some(()));
    }

    /// Presses Draw and waits for the picture, and does `meanwhile` again and again until it is there.
    fn draw(&self, mut meanwhile: impl FnMut()) {
        let before: usize = self.fact("pictures").parse().unwrap_or(0);
        self.click("draw");
        wait_for("finished picture", 60, || {
            meanwhile();
            (self.fact("pictures") == (before + 1).to_string()).then_some(())
        });
        self.rests(5);
    }

    /// Pixels of the progress bar that are filled; `None` if there is none.
    fn filled(&self) -> Option<usize> {
        let [x0, y0, x1, y1] = self.said.lock().unwrap().places.get("progress").copied()?;
        let line = self.screen.line((y0 + y1) as u32 / 2);
        Some(line[x0 as usize..x1 as usize].iter().filter(|pixel| pixel.0 == [108, 140, 255]).count())
    }

    /// The frames of the last stretch of an activity.
    fn frames(&self, activity: &str) -> Frames {
        let said = self.said.lock().unwrap();
        said.frames.iter().rfind(|(of, _)| of == activity).expect("frames of it").1
    }

    /// Waits until the canvas shows a picture: each of its pixels is a square of one colour.
    fn shows(&self, picture: &RgbImage) {
        wait_for("canvas with what the library draws", 5, || {
            let [x0, y0, x1, y1] = self.place("picture").map(|at| at as u32);
            let scale = (x1 - x0) / picture.width();
            assert!(scale >= 4, "the picture is {} pixels wide on the screen", x1 - x0);
            let size = (picture.width() * scale, picture.height() * scale);
            let (screen, corners) = (self.screen.picture(), [1, scale / 2, scale - 2]);
            let shown =
                |x, y| corners.map(|inside| *screen.get_pixel(x0 + x * scale + inside, y0 + y * scale + inside));
            let same = picture.enumerate_pixels().all(|(x, y, pixel)| shown(x, y) == [*pixel; 3]);
            ((x1 - x0, y1 - y0) == size && same).then_some(())
        });
    }
}

impl Said {
    fn hear(&mut self, line: &str) {
        let (subject, rest) = line.split_once(' ').unwrap();
        let numbers = |words: &str| words.split(' ').map(|word| word.parse::<f64>().unwrap()).collect::<Vec<_>>();
        match subject {
            "place" => {
                let (name, corners) = rest.split_once(' ').unwrap();
                let corners: Vec<i32> = numbers(corners).iter().map(|&corner| corner as i32).collect();
                self.places.insert(name.to_owned(), corners.try_into().unwrap());
            }
            "value" => {
                let (name, text) = rest.split_once(' ').unwrap();
                self.values.insert(name.to_owned(), text.to_owned());
            }
            "gone" => drop(self.places.remove(rest)),
            "frames" => {
                let (activity, figures) = rest.split_once(' ').unwrap();
                let figures = numbers(figures);
                let frames = Frames { count: figures[0], longest: figures[1], mean: figures[2] };
                self.frames.push((activity.to_owned(), frames));
            }
            _ => {
                if subject == "progress" {
                    let (done, total) = rest.split_once(' ').unwrap();
                    self.course.push((done.parse().unwrap(), total.parse().unwrap()));
                }
                self.facts.insert(subject.to_owned(), rest.to_owned());
            }
        }
    }
}

impl Drop for Studio {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn build(folder: &Path) -> PathBuf {
    let (prefix, build) = (folder.join("installed"), folder.join("build"));
    install::install(&prefix);
    let mut configure = tool("cmake");
    configure.args(["-G", "Ninja", "-S", text(&root().join("examples/cpp/studio")), "-B", text(&build)]);
    // The system's own pkg-config, which knows where its packages are.
    let output = c::succeed(std::process::Command::new("which").arg("pkg-config"));
    let pkg_config = String::from_utf8(output.stdout).unwrap();
    configure.args(["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-Werror"]);
    configure.arg(format!("-DPKG_CONFIG_EXECUTABLE={}", pkg_config.trim()));
    c::succeed(configure.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display())));
    c::succeed(tool("cmake").arg("--build").arg(&build));
    build.join("studio")
}

/// Processor time in ticks: all that passed since the machine's start, what of it was spent, and what these processes
/// spent. The kernel counts the last two apart, so that over a short while either may come out ahead.
fn processor_time(own: &[u32]) -> [u64; 3] {
    let numbers = |line: &str| line.split_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<u64>>();
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let machine = numbers(stat.lines().next().unwrap());
    let (all, rested) = (machine[..8].iter().sum::<u64>(), machine[3] + machine[4]);
    let spent = |id: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        let after_name = stat.rsplit_once(") ").unwrap().1.split(' ');
        after_name.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>()
    };
    [all, all - rested, own.iter().map(spent).sum()]
}

fn a_model_is_opened(studio: &Studio) {
    studio.enter("model", "/nowhere");
    studio.click("open");
    wait_for("error", 10, || studio.fact("message").starts_with("failed").then_some(()));
    assert!(studio.fact("message").contains("/nowhere"), "{}", studio.fact("message"));
    studio.enter("model", text(&root().join("models/emoji/onnx")));
    studio.click("open");
    wait_for("open model", 20, || studio.fact("message").starts_with("ok Opened").then_some(()));
}

/// The picture is the library's, and was announced by a bar that only grows.
fn a_picture_is_drawn_with_a_concept(studio: &Studio) -> RgbImage {
    studio.enter("prompt", PROMPT);
    studio.set("steps", STEPS);
    studio.drag("strength/green-apple", true);
    let mut filled = Vec::new();
    studio.draw(|| filled.extend(studio.filled()));
    filled.dedup();
    // The last look may come between the frame without a bar and the word that it is gone.
    filled.truncate(filled.iter().rposition(|&pixels| pixels > 0).map_or(0, |at| at + 1));
    assert!(filled.len() > 3 && filled.is_sorted(), "the progress bar did not grow: {filled:?}");
    let picture = drawn(PROMPT, STEPS, GUIDANCE, 1, &[(root().join("models/concepts/green-apple.safetensors"), 1.0)]);
    studio.shows(&picture);
    picture
}

fn cancel_ends_a_long_draw(studio: &Studio) {
    studio.set("steps", 60);
    studio.said.lock().unwrap().course.clear();
    studio.click("draw");
    wait_for("third step", 30, || studio.said.lock().unwrap().course.contains(&(3, 60)).then_some(()));
    assert!(!studio.said.lock().unwrap().places.contains_key("draw"), "Draw is there beside Cancel");
    assert!(studio.place("preview")[2] > 0);
    let pressed = Instant::now();
    studio.click("cancel");
    studio.rests(10);
    let took = pressed.elapsed().as_millis();
    screen::say(&format!("studio: {took} ms from the hand on Cancel to rest, 210 of them the hand's"));
    assert_eq!((studio.fact("message").as_str(), studio.fact("pictures").as_str()), ("ok Cancelled", "1"));
    assert!(studio.said.lock().unwrap().course.last().unwrap().0 < 50, "the draw went on");
}

/// Without the concept the next picture is the base model's; it is saved as it is.
fn another_is_drawn_and_saved(studio: &Studio, first: &RgbImage) {
    studio.set("steps", STEPS);
    studio.drag("strength/green-apple", false);
    studio.draw(|| ());
    let base = drawn(PROMPT, STEPS, GUIDANCE, 1, &[]);
    assert!(base != *first, "the concept changed nothing");
    studio.shows(&base);
    studio.click("save");
    let file = wait_for("saved picture", 10, || studio.fact("message").strip_prefix("ok Saved ").map(str::to_owned));
    assert!(image::open(&file).unwrap().into_rgb8() == base, "{file} holds another picture");
}

/// What a search finds is tested elsewhere: here that it gets its pictures and words, is under way, and stops.
fn a_search_begins_and_is_cancelled(studio: &Studio) {
    studio.click("find");
    studio.enter("find/pictures", text(&root().join("models/emoji/subjects/octopus")));
    studio.enter("find/noun", "animal");
    studio.click("find/start");
    wait_for("search", 10, || (studio.fact("activity") == "searching").then_some(()));
    studio.click("cancel");
    studio.rests(30);
    assert_eq!(studio.fact("message"), "ok Cancelled");
}

/// No frame comes late while a picture is drawn. That can be told only while the machine does little else, and of a
/// renderer that is fast enough at rest.
fn frames_come_in_time(studio: &Studio) {
    let own = [studio.program.id(), studio.screen.id(), std::process::id()];
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(700));
        let before = processor_time(&own);
        studio.draw(|| ());
        let after = processor_time(&own);
        let [all, spent, ours] = [0, 1, 2].map(|i| after[i].saturating_sub(before[i]));
        let share = spent.saturating_sub(ours) as f64 / all.max(1) as f64;
        let [drawing, idle] = ["drawing", "idle"].map(|activity| studio.frames(activity));
        let told = |of: Frames| format!("{} frames of {:.0} ms, the longest {:.0} ms", of.count, of.mean, of.longest);
        let percent = share * 100.0;
        let report =
            format!("drawing {}; at rest {}; others had {percent:.0} % of the processors", told(drawing), told(idle));
        screen::say(&format!("studio: {report}"));
        if drawing.longest <= LONGEST_FRAME {
            return;
        }
        assert!(share > 0.1 || idle.longest > LONGEST_FRAME, "{report}");
    }
    screen::say("studio: no quiet moment; whether frames come in time was not told");
}

#[test]
fn a_user_draws_cancels_draws_again_and_saves() {
    let programs = [("Xvfb", "xvfb"), ("xdotool", "xdotool"), ("pkg-config", "pkg-config")];
    let packages =
        [("sdl2", "libsdl2-dev"), ("imgui", "libimgui-dev"), ("fontconfig", "libfontconfig-dev"), ("gl", "libgl-dev")];
    if screen::lacks("the graphical C++ host", &programs, &packages) {
        return;
    }
    let folder = install::empty_folder("studio");
    let pictures = folder.join("pictures");
    std::fs::create_dir(&pictures).unwrap();
    let mut studio = Studio::start(&build(&folder), &pictures);
    a_model_is_opened(&studio);
    let first = a_picture_is_drawn_with_a_concept(&studio);
    cancel_ends_a_long_draw(&studio);
    another_is_drawn_and_saved(&studio, &first);
    // The sheet holds both, and the older one can be looked at again.
    studio.click("sheet/1");
    studio.shows(&first);
    assert!(["open", "browse", "add", "find", "seed", "guidance", "use"].iter().all(|name| studio.place(name)[2] > 0));
    a_search_begins_and_is_cancelled(&studio);
    frames_come_in_time(&studio);
    // It ends in good order when it is told to.
    // SAFETY: a signal to a child that has not been waited for.
    unsafe { libc::kill(studio.program.id() as i32, libc::SIGTERM) };
    assert!(wait_for("end", 10, || studio.program.try_wait().unwrap()).success());
}
