use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::config::{HealthKind, OnFailure};

fn target(interval_ms: u64, rise: u32, fall: u32) -> Target {
    Target {
        service: "web".into(),
        socket: "192.0.2.1:80".parse().unwrap(),
        backend: BackendId::new("10.0.2.21".parse().unwrap(), phalanx_flow::Method::IpIp, 0),
        health: HealthConfig {
            kind: HealthKind::Tcp,
            interval: Duration::from_millis(interval_ms),
            timeout: Duration::from_millis(interval_ms),
            rise,
            fall,
            on_failure: OnFailure::Keep,
        },
        source: "10.0.1.11".parse().unwrap(),
    }
}

fn status(target: &Target) -> Arc<Mutex<BackendCheck>> {
    Arc::new(Mutex::new(BackendCheck {
        service: target.service.clone(),
        backend: target.backend,
        healthy: true,
        good: 0,
        bad: 0,
        last_bad: String::new(),
    }))
}

#[tokio::test]
async fn a_backend_that_dies_and_comes_back_makes_two_changes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let alive = Arc::new(AtomicBool::new(true));
    let target = target(5, 2, 3);
    let status = status(&target);
    let (sender, mut changes) = mpsc::unbounded_channel();
    let connect = {
        let alive = Arc::clone(&alive);
        move || {
            let alive = Arc::clone(&alive);
            async move {
                if alive.load(Ordering::Relaxed) {
                    TcpStream::connect(address).await
                } else {
                    Err(std::io::ErrorKind::ConnectionRefused.into())
                }
            }
        }
    };
    let health = Health::healthy(2, 3);
    let task = tokio::spawn(run(target, health, Arc::clone(&status), sender, connect));

    // While it lives nothing is reported.
    while lock(&status).good < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    changes.try_recv().unwrap_err();
    assert!(lock(&status).healthy);

    alive.store(false, Ordering::Relaxed);
    let change = changes.recv().await.unwrap();
    assert!(!change.healthy && change.reason.starts_with("connection failed"), "{change:?}");
    assert!(!lock(&status).healthy && lock(&status).bad >= 3);

    alive.store(true, Ordering::Relaxed);
    let change = changes.recv().await.unwrap();
    assert!(change.healthy, "{change:?}");

    task.abort();
}

#[tokio::test]
async fn a_driver_without_checks_makes_nothing_in_the_kernel() {
    struct Nowhere;
    impl ProbeSender for Nowhere {
        fn send_probe(&self, _: BackendId, _: &[u8]) {
            panic!("nothing is checked");
        }
    }
    let text = include_str!("../../../../../docs/operating/phalanx.toml");
    let text: String = text.replace("[service.health]", "[service.gone]");
    let gone = text.find("[service.gone]").unwrap();
    let end = text[gone..].find("[[service.backend]]").unwrap();
    let text = format!("{}{}", &text[..gone], &text[gone + end..]);
    let config = Config::parse("phalanx.toml".as_ref(), &text, &crate::config::tests::Machine).unwrap();
    let (changes, _) = mpsc::unbounded_channel();
    let driver = HealthDriver::start(&config, Arc::new(Nowhere), changes).unwrap();
    assert!(driver.packets.is_none());
    assert_eq!(driver.statuses(), []);
}

#[test]
fn jitter_stays_within_a_tenth() {
    let mut random = StdRng::from_seed([1; 32]);
    let second = Duration::from_secs(1);
    let all: Vec<Duration> = (0..1000).map(|_| jittered(second, &mut random)).collect();
    assert!(all.iter().all(|time| (0.9..=1.1).contains(&time.as_secs_f64())));
    assert!(all.iter().any(|time| *time < second.mul_f64(0.92)));
    assert!(all.iter().any(|time| *time > second.mul_f64(1.08)));
}

#[test]
fn a_port_that_is_used_again_belongs_to_the_new_backend() {
    let ports = Ports::default();
    let backend = |last: u8| BackendId::new(IpAddr::from([10, 0, 2, last]), phalanx_flow::Method::Gue, 6080);
    assert_eq!(ports.backend(40_000), None);
    ports.assign(40_000, backend(21));
    ports.assign(40_000, backend(22));
    assert_eq!(ports.backend(40_000), Some(backend(22)));
}
