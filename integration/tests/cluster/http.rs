//! nginx as the servers and wrk as the client, with every body compared, and a slow download of our own.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use phalanx::lab::netns::Netns;
use phalanx::lab::{Action, Lab, LabOptions};
use phalanx_integration::{at, site};
use serde_json::Value;

/// Bytes of the file that wrk fetches: more than one window.
const SMALL_BYTES: usize = 40_000;
/// Bytes of the file that is fetched slowly: more than fits into the buffers on the way.
const LARGE_BYTES: usize = 24 << 20;
const WRK_CONNECTIONS: u32 = 100;
const WRK_DURATION: Duration = Duration::from_secs(10);
/// Compares every body with the file, and prints what it counted as JSON. One request a connection every 0.1 s or so, so that the
/// clients do not keep the machine to themselves.
const WRK_SCRIPT: &str = r#"
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init(args)
    local file = io.open(args[1], "rb")
    expected = file:read("*a")
    file:close()
    good = 0
    bad = 0
end
function delay() return math.random(50, 150) end
function response(status, headers, body)
    if status == 200 and body == expected then good = good + 1 else bad = bad + 1 end
end
function done(summary, latency, requests)
    local good, bad = 0, 0
    for _, thread in ipairs(threads) do
        good = good + thread:get("good")
        bad = bad + thread:get("bad")
    end
    local e = summary.errors
    io.write(string.format(
        '\nRESULT {"good":%d,"bad":%d,"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}\n',
        good, bad, e.connect, e.read, e.write, e.status, e.timeout))
end
"#;

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already cannot be killed, and that is well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes that say where they belong: no two stretches of the file are alike.
fn body(length: usize) -> Vec<u8> {
    (0..length.div_ceil(8) as u64)
        .flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes())
        .take(length)
        .collect()
}

fn start_nginx(netns: &Netns, number: u32, directory: &Path, target: SocketAddr) -> Process {
    let d = directory.display();
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {d}/nginx{number}-{kind};"))
        .join(" ");
    let text = format!(
        "daemon off; master_process off; pid {d}/nginx{number}.pid; error_log {d}/nginx{number}.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; {temporary} keepalive_requests 1000000; default_type application/octet-stream;\n\
         server {{ listen {target}; root {d}/www; }} }}\n"
    );
    let file = directory.join(format!("nginx{number}.conf"));
    fs::write(&file, text).expect("write");
    let mut command = Command::new("nginx");
    command.arg("-c").arg(&file).arg("-e").arg(directory.join(format!("nginx{number}.log")));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = Process(netns.spawn(&mut command).expect("nginx: apt-get install nginx-light"));
    let start = Instant::now();
    while netns.connect(target, Duration::from_millis(200)).is_err() {
        if let Some(status) = process.0.try_wait().expect("wait") {
            let log = fs::read_to_string(directory.join(format!("nginx{number}.log"))).unwrap_or_default();
            panic!("nginx {number} ended with {status}: {log}");
        }
        assert!(start.elapsed() < Duration::from_secs(5), "nginx {number} does not listen");
        sleep(Duration::from_millis(20));
    }
    process
}

/// What came of it.
struct Outcome {
    wrk: Value,
    /// Whether the slow download got the file, byte by byte.
    download: Result<(), String>,
}

impl Outcome {
    fn count(&self, what: &str) -> u64 {
        self.wrk[what].as_u64().expect("a number")
    }

    fn errors(&self) -> u64 {
        ["bad", "connect", "read", "write", "status", "timeout"].iter().map(|what| self.count(what)).sum()
    }
}

/// Fetches `path` in small steps for `at_least` this long, and compares it with the file.
fn download(client: &Netns, target: SocketAddr, path: &Path, at_least: Duration) -> Result<(), String> {
    let say = |error: std::io::Error| error.to_string();
    let expected = fs::read(path).map_err(say)?;
    let mut stream = client.connect(target, Duration::from_secs(5)).map_err(|error| format!("{error:#}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(say)?;
    let name = path.file_name().unwrap_or_default().display();
    write!(stream, "GET /{name} HTTP/1.1\r\nHost: phalanx\r\nConnection: close\r\n\r\n").map_err(say)?;
    let mut answer = Vec::with_capacity(expected.len() + 1024);
    let mut buffer = vec![0; 256 << 10];
    let pause = at_least / (expected.len() / buffer.len()) as u32;
    loop {
        let count = stream.read(&mut buffer).map_err(say)?;
        if count == 0 {
            break;
        }
        answer.extend_from_slice(&buffer[..count]);
        sleep(pause.mul_f64(count as f64 / buffer.len() as f64));
    }
    let head = answer.windows(4).position(|end| end == b"\r\n\r\n").ok_or("no end of the header")?;
    if !answer.starts_with(b"HTTP/1.1 200 ") {
        return Err(String::from_utf8_lossy(&answer[..head]).into_owned());
    }
    let body = &answer[head + 4..];
    if body == expected {
        Ok(())
    } else {
        Err(format!("{} bytes of {} or others", body.len(), expected.len()))
    }
}

fn run(options: LabOptions) -> Outcome {
    let directory = tempfile::tempdir().expect("a directory");
    let www = directory.path().join("www");
    fs::create_dir(&www).expect("a directory");
    let (small, large) = (www.join("small.bin"), www.join("large.bin"));
    fs::write(&small, body(SMALL_BYTES)).expect("write");
    fs::write(&large, body(LARGE_BYTES)).expect("write");
    let script = directory.path().join("compare.lua");
    fs::write(&script, WRK_SCRIPT).expect("write");

    let mut lab = Lab::new(LabOptions { traffic: false, ..options }).expect("a site");
    let target = lab.world().target();
    let servers: Vec<Process> = lab
        .world()
        .backends
        .iter()
        .map(|host| start_nginx(&host.netns, host.number, directory.path(), target))
        .collect();
    lab.start_members().expect("a cluster");

    let mut command = Command::new("wrk");
    command
        .args(["--threads", "1", "--connections", &WRK_CONNECTIONS.to_string()])
        .args(["--duration", &format!("{}s", WRK_DURATION.as_secs()), "--timeout", "5s", "--script"])
        .arg(&script)
        .arg(format!("http://{target}/small.bin"))
        .arg("--")
        .arg(&small);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let wrk = lab.world().client.spawn(&mut command).expect("wrk: apt-get install wrk");
    let mut wrk = Process(wrk);

    let mut events = lab.options().events.clone();
    events.sort_by_key(|event| event.at);
    // Descriptors stay valid while the lab lives; the thread has one of its own.
    let download = lab
        .world()
        .client
        .try_clone()
        .map(|client| {
            std::thread::spawn(move || download(&client, target, &large, WRK_DURATION.mul_f64(0.8)))
        })
        .expect("a thread");
    let start = Instant::now();
    let mut events = events.into_iter().peekable();
    while wrk.0.try_wait().expect("wait").is_none() {
        while let Some(event) = events.next_if(|event| event.at <= start.elapsed()) {
            lab.carry_out(event.action).expect("done");
        }
        lab.poll().expect("poll");
        assert!(start.elapsed() < 4 * WRK_DURATION, "wrk does not end");
        sleep(Duration::from_millis(10));
    }
    assert!(events.next().is_none(), "all was done while wrk ran");
    let mut text = String::new();
    wrk.0.stdout.take().expect("a pipe").read_to_string(&mut text).expect("text");
    println!("{text}");
    let result = text.lines().find_map(|line| line.strip_prefix("RESULT ")).expect("a result");
    let outcome = Outcome {
        wrk: serde_json::from_str(result).expect("JSON"),
        download: download.join().expect("the download's thread"),
    };
    println!("slow download: {:?}", outcome.download);
    assert_eq!(lab.problems(), [""; 0]);
    drop(servers);
    outcome
}

fn killed() -> LabOptions {
    site(
        0,
        &[
            at(2.0, Action::AddBackend(None)),
            at(2.1, Action::AddBackend(None)),
            at(2.2, Action::DrainBackend(1)),
            at(4.0, Action::Kill(2)),
        ],
    )
}

fn assert_whole(outcome: &Outcome) {
    assert_eq!(outcome.errors(), 0, "{}", outcome.wrk);
    // Ten seconds, a hundred connections, about ten requests a second each; half of it is allowed for.
    let expected = WRK_DURATION.as_secs() * u64::from(WRK_CONNECTIONS) * 10;
    assert!(outcome.count("good") > expected / 2, "only {} bodies", outcome.count("good"));
    assert_eq!(outcome.download, Ok(()));
}

#[test]
fn nginx_and_wrk_notice_nothing_of_a_death_on_a_lan() {
    assert_whole(&run(killed()));
}

#[test]
fn wrk_notices_a_death_without_replication() {
    let outcome = run(LabOptions { replication: false, ..killed() });
    assert!(outcome.errors() > 0, "nothing broke: the other tests prove nothing: {}", outcome.wrk);
}
