//! A screen without a monitor: programs with windows run on it, xdotool moves its mouse and types, and what it shows is
//! read back pixel by pixel. Hosts of the library are tried on it as a user would.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use image::{Rgb, RgbImage};
use tempfile::TempDir;

use crate::{c, support};

/// Writes a line for whoever runs the tests; the harness keeps what `eprintln!` writes to itself when a test passes.
pub fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).expect("a line");
}

/// Whether this machine lacks something that a test needs: programs, or packages of pkg-config, each with the Debian
/// package that brings it. If so, says it.
pub fn lacks(test: &str, programs: &[(&str, &str)], packages: &[(&str, &str)]) -> bool {
    let found = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    };
    let known =
        |package: &str| Command::new("pkg-config").args(["--exists", package]).status().is_ok_and(|s| s.success());
    let mut missing: Vec<&str> =
        programs.iter().filter(|(name, _)| !found(name)).map(|(_, package)| *package).collect();
    missing.extend(packages.iter().filter(|(name, _)| !known(name)).map(|(_, package)| *package));
    missing.dedup();
    if !missing.is_empty() {
        say(&format!("SKIPPED {test}: not on this machine; apt-get install {}", missing.join(" ")));
    }
    !missing.is_empty()
}

/// A running X server with nothing on it. It ends with this value.
pub struct Screen {
    server: Child,
    display: String,
    folder: TempDir,
}

impl Screen {
    pub fn start(width: u32, height: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut server = Command::new("Xvfb")
            .args(["-displayfd", "1", "-nolisten", "tcp", "-screen", "0", &format!("{width}x{height}x24"), "-fbdir"])
            .arg(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("Xvfb");
        let mut display = String::new();
        let mut lines = BufReader::new(server.stdout.take().expect("its output"));
        lines.read_line(&mut display).expect("the number of its display");
        Self { server, display: format!(":{}", display.trim()), folder }
    }

    /// A program whose windows open here.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("DISPLAY", &self.display).env_remove("WAYLAND_DISPLAY").env_remove("XAUTHORITY");
        // OpenGL by the processor, wherever the test runs.
        command.env("LIBGL_ALWAYS_SOFTWARE", "1").env("SDL_VIDEODRIVER", "x11");
        command
    }

    /// What the user's hands do, as xdotool calls it.
    pub fn act(&self, words: &[&str]) -> String {
        let output = c::succeed(self.command("xdotool").args(words));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Gives the keyboard to a window, as a window manager would, once it is in sight.
    pub fn focus(&self, window: &str) {
        wait_for("window that takes the keyboard", 20, || {
            self.command("xdotool").args(["windowfocus", window, "sleep", "0.1"]).output().expect("xdotool");
            (self.act(&["getwindowfocus"]).trim() == window).then_some(())
        });
    }

    pub fn click(&self, [x, y]: [i32; 2]) {
        self.act(&["mousemove", &x.to_string(), &y.to_string(), "sleep", "0.08", "mousedown", "1", "sleep", "0.08"]);
        self.act(&["mouseup", "1", "sleep", "0.05"]);
    }

    pub fn type_text(&self, text: &str) {
        self.act(&["type", "--delay", "8", "--", text]);
    }

    /// What is on the screen now.
    pub fn picture(&self) -> RgbImage {
        let bytes = std::fs::read(self.frame_buffer()).expect("the server's frame buffer");
        let frame = Frame::read(&bytes);
        RgbImage::from_fn(frame.width, frame.height, |x, y| frame.pixel(&bytes[frame.start(y)..], x))
    }

    /// One line of what is on the screen now: far less work than all of it.
    pub fn line(&self, y: u32) -> Vec<Rgb<u8>> {
        let file = std::fs::File::open(self.frame_buffer()).expect("the server's frame buffer");
        let mut header = [0; Frame::HEADER];
        file.read_exact_at(&mut header, 0).expect("its header");
        let frame = Frame::read(&header);
        let mut bytes = vec![0; frame.bytes_in_line];
        file.read_exact_at(&mut bytes, frame.start(y) as u64).expect("a line");
        (0..frame.width).map(|x| frame.pixel(&bytes, x)).collect()
    }

    /// The server's process.
    pub fn id(&self) -> u32 {
        self.server.id()
    }

    fn frame_buffer(&self) -> PathBuf {
        self.folder.path().join("Xvfb_screen0")
    }
}

/// The X window dump format: a header of words, the window's name, the colours of its map, then lines of pixels.
struct Frame {
    width: u32,
    height: u32,
    bytes_in_line: usize,
    pixels: usize,
}

impl Frame {
    const HEADER: usize = 100;

    fn read(header: &[u8]) -> Self {
        let word = |at: usize| u32::from_be_bytes(header[4 * at..4 * at + 4].try_into().expect("a word"));
        assert!(word(1) == 7 && word(7) == 0 && word(11) == 32, "another form of frame buffer");
        let pixels = word(0) as usize + 12 * word(19) as usize;
        Self { width: word(4), height: word(5), bytes_in_line: word(12) as usize, pixels }
    }

    fn start(&self, y: u32) -> usize {
        self.pixels + y as usize * self.bytes_in_line
    }

    fn pixel(&self, line: &[u8], x: u32) -> Rgb<u8> {
        let at = 4 * x as usize;
        Rgb([line[at + 2], line[at + 1], line[at]])
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Asks `done` until it has an answer.
pub fn wait_for<T>(what: &str, seconds: u64, mut done: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(answer) = done() {
            return answer;
        }
        assert!(Instant::now() < end, "no {what} after {seconds} s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The picture that the library draws by itself.
pub fn drawn(prompt: &str, steps: u32, guidance: f64, seed: u64, concepts: &[(PathBuf, f64)]) -> RgbImage {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("drawn.png");
    let mut command = Command::new(support::interpreter());
    command.arg("-B").arg(root.join("tests/python/draw.py")).arg(root.join("models/emoji/onnx")).arg(&file);
    command.args([prompt, &steps.to_string(), &guidance.to_string(), &seed.to_string()]);
    command.args(concepts.iter().map(|(file, strength)| format!("{}={strength}", file.display())));
    command.env("PYTHONPATH", root.join("bindings/python")).env("MACULA_LIBRARY", c::library());
    c::succeed(command.env("MACULA_ONNXRUNTIME", support::onnxruntime()));
    image::open(&file).expect("a picture").into_rgb8()
}
