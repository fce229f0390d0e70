//! The run: what happens when, and what is seen of it.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::io::{IsTerminal as _, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use phalanx_flow::Method;

use crate::config::ForwarderKind;

use super::member::{BackendLine, ClusterFile, Member, write_key};
use super::metrics::{self, Interest, Scraper};
use super::pins::Pins;
use super::report::{EventReport, Report};
use super::router::Router;
use super::scenario::{Action, Event};
use super::share::ConsistentTable;
use super::traffic::{Traffic, TrafficOptions};
use super::weather::{Weather, v4_addresses};
use super::world::{Topology, World, WorldOptions};
use super::{LabOptions, privilege};

mod broken;
mod chaos;
mod upgrade;

/// How often the lab looks at the clock, its children and the router.
const TICK: Duration = Duration::from_millis(10);
/// A cluster that has not found itself by then will not.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// A decapsulator makes its device at once.
const DECAP_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections may take 30 s to be declared broken, and need a moment to end.
const FINISH_TIMEOUT: Duration = Duration::from_secs(40);
/// How long members are given to leave at the end.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(1500);
/// How often progress is shown: on a terminal, and elsewhere.
const PROGRESS_PERIOD: Duration = Duration::from_secs(1);
const LOG_PROGRESS_PERIOD: Duration = Duration::from_secs(5);
/// Descriptors beside two for each connection.
const SPARE_FILES: u64 = 2048;
/// Weight of every member and backend.
const WEIGHT: u32 = 100;
/// UDP port of method "gue" (the configuration's default).
const GUE_PORT: u16 = 6080;
/// The device that a decapsulator makes.
const DECAP_DEVICE: &str = "phx-decap";
/// Members and backends that chaos needs: one goes and two are left.
const LEAST_FOR_CHAOS: u32 = 3;
/// Flows a member is asked about, to see that it and the lab compute the same table.
const CROSS_CHECKS: usize = 4;

/// A site with its members, and optionally its traffic.
///
/// [`super::run`] does it all. Callers with traffic of their own use, in this order: [`Lab::new`], [`Lab::world`] to put servers and
/// clients into its namespaces, [`Lab::start_members`], [`Lab::carry_out`] and [`Lab::poll`] (often), [`Lab::finish`].
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: processes first, then the files they use, then the namespaces.
    members: Vec<Member>,
    decapsulators: Vec<Decapsulator>,
    traffic: Option<Traffic>,
    scraper: Scraper,
    router: Router,
    pins: Option<Pins>,
    directory: Directory,
    world: World,
    options: LabOptions,
    program: PathBuf,
    backends: Vec<BackendLine>,
    resumes: Vec<(Instant, u32)>,
    lasting: Vec<chaos::Lasting>,
    /// Members whose links are whole again and which the router does not use yet.
    returning: Vec<(Instant, u32)>,
    drained: BTreeSet<u32>,
    failing: BTreeSet<u32>,
    chaos: chaos::Book,
    problems: Vec<String>,
    windows: Vec<EventReport>,
    deviating: Option<f64>,
    cross_checked: bool,
    start: Instant,
    shown: Option<Instant>,
    last_event: String,
    /// The connections that were said to be broken.
    told_broken: HashSet<u64>,
}

impl Lab {
    /// Builds the site: namespaces, links, servers, decapsulators. No member runs yet.
    pub fn new(options: LabOptions) -> Result<Self> {
        let method = options.method();
        if method == Method::L2 && options.topology == Topology::Routed {
            bail!(
                "method l2 needs members and backends on one segment: use ipip or gue, or the topology lan"
            );
        }
        privilege::raise_file_limit(2 * options.long_lived() + SPARE_FILES)?;
        let mut highest = (options.members, options.backends);
        for event in &options.events {
            match event.action {
                Action::Join(None) => highest.0 += 1,
                Action::Join(Some(id)) => highest.0 = highest.0.max(id),
                Action::AddBackend(None) => highest.1 += 1,
                Action::AddBackend(Some(id)) => highest.1 = highest.1.max(id),
                _ => {}
            }
        }
        if options.chaos.is_some() {
            let site = Self::chaos_site(&options);
            if site.members < LEAST_FOR_CHAOS || site.backends < LEAST_FOR_CHAOS {
                bail!("chaos needs {LEAST_FOR_CHAOS} members and {LEAST_FOR_CHAOS} backends or more");
            }
            highest = (highest.0.max(site.member_hosts()), highest.1.max(site.backend_hosts()));
        }
        let world = World::build(WorldOptions {
            topology: options.topology,
            members: if options.direct { 0 } else { highest.0 },
            backends: highest.1,
            mtu: options.mtu,
            ipv6: options.ipv6,
            client_offloads: options.client_offloads,
            xdp: options.forwarder == ForwarderKind::Xdp,
            filter_icmp: options.filter_icmp,
            server_mss: options.server_mss,
        })?;
        let program = match &options.program {
            Some(program) => program.clone(),
            None => std::env::current_exe().context("cannot find this program's own file")?,
        };
        let directory = Directory::new(options.keep.as_deref())?;
        write_key(&directory.path.join("cluster.key"))?;
        let xdp = options.forwarder == ForwarderKind::Xdp && !options.direct;
        let pins = xdp.then(|| Pins::mount(&directory.path)).transpose()?;
        let mut router = Router::new(&world.router, world.service(), options.router_detect)?;
        let hops = if options.direct { &world.backends } else { &world.members };
        for host in hops {
            router.add(host.number, host.next_hop(options.ipv6));
        }
        let members = world
            .members
            .iter()
            .map(|host| Member::new(host.number, host.netns.clone(), &program, &directory.path))
            .collect();
        let scraper = Scraper::start(world.members.iter().map(|host| host.netns.clone()))?;
        let traffic = options.traffic.then(|| Traffic::new(world.listeners()?)).transpose()?;
        let mut lab = Self {
            members,
            decapsulators: Vec::new(),
            traffic,
            scraper,
            router,
            pins,
            directory,
            world,
            program,
            backends: Vec::new(),
            resumes: Vec::new(),
            lasting: Vec::new(),
            returning: Vec::new(),
            drained: BTreeSet::new(),
            failing: BTreeSet::new(),
            chaos: chaos::Book::default(),
            problems: Vec::new(),
            windows: Vec::new(),
            deviating: None,
            cross_checked: false,
            start: Instant::now(),
            shown: None,
            last_event: String::new(),
            told_broken: HashSet::new(),
            options,
        };
        lab.backends = (1..=lab.options.backends).map(|number| lab.backend_line(number)).collect();
        lab.start_decapsulators()?;
        Ok(lab)
    }

    /// The site.
    pub const fn world(&self) -> &World {
        &self.world
    }

    /// What it was told. Its events are carried out by [`super::run`] only.
    pub const fn options(&self) -> &LabOptions {
        &self.options
    }

    /// What went wrong so far, beside connections.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    fn backend_address(&self, number: u32) -> IpAddr {
        // Frames are rewritten within one family; tunnels carry either, and here always over IPv4.
        let v6 = self.options.ipv6 && self.options.method() == Method::L2;
        let host = self.world.backends.get(number as usize - 1);
        host.map_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), |host| host.address(v6))
    }

    fn backend_line(&self, number: u32) -> BackendLine {
        BackendLine { number, address: self.backend_address(number), weight: WEIGHT, drain: false }
    }

    fn start_decapsulators(&mut self) -> Result<()> {
        if self.options.direct || self.options.method() == Method::L2 {
            return Ok(());
        }
        for host in &self.world.backends {
            let mut command = Command::new(&self.program);
            command.args(["decap", "--device", DECAP_DEVICE, "--gue-port", &GUE_PORT.to_string()]);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            let child = host.netns.spawn(&mut command)?;
            self.decapsulators.push(Decapsulator { backend: host.number, child });
        }
        for (host, process) in self.world.backends.iter().zip(&mut self.decapsulators) {
            let mut netlink = host.netns.netlink()?;
            let start = Instant::now();
            while !netlink.link(DECAP_DEVICE).is_ok_and(|link| link.up) {
                if let Some(status) = process.child.try_wait()? {
                    bail!("the decapsulator of backend {} ended with {status}", host.number);
                }
                if start.elapsed() > DECAP_TIMEOUT {
                    bail!("the decapsulator of backend {} makes no device", host.number);
                }
                sleep(TICK);
            }
        }
        Ok(())
    }

    /// Starts the first members and waits until each sees all others.
    pub fn start_members(&mut self) -> Result<()> {
        if self.options.direct {
            for number in 1..=self.options.backends {
                self.router.handle_liveness(number, true, Instant::now());
            }
            return self.router.poll(Instant::now());
        }
        self.configure_all()?;
        let count = self.options.members as usize;
        for index in 0..count {
            self.members[index].start()?;
            self.scraper.set_interest(index, Interest::Ready);
        }
        let start = Instant::now();
        let wanted = count as f64;
        loop {
            self.poll()?;
            if let Some(problem) = self.problems.first() {
                bail!("{problem}");
            }
            let sees_all = |index| {
                self.scraper.is_ready(index)
                    && self
                        .scraper
                        .value(index, "phalanx_members{state=\"alive\"}")
                        .is_some_and(|alive| (alive - wanted).abs() < 0.5)
            };
            if (0..count).all(sees_all) {
                self.say(&format!(
                    "{count} members found each other in {:.1} s",
                    start.elapsed().as_secs_f64()
                ));
                return Ok(());
            }
            self.check_interrupt()?;
            if start.elapsed() > START_TIMEOUT {
                let late: Vec<String> = (0..count)
                    .filter(|index| !sees_all(*index))
                    .map(|index| {
                        let member = &self.members[index];
                        let state =
                            if self.scraper.is_ready(index) { "does not see all" } else { "is not ready" };
                        format!("member {} {state}{}", member.id, member.last_words())
                    })
                    .collect();
                bail!("the cluster did not form in {} s: {}", START_TIMEOUT.as_secs(), late.join("; "));
            }
            sleep(TICK);
        }
    }

    fn check_interrupt(&self) -> Result<()> {
        if self.options.interrupt.load(Ordering::Relaxed) { bail!("interrupted") } else { Ok(()) }
    }

    fn configure_all(&self) -> Result<()> {
        let file = ClusterFile {
            seeds: self
                .world
                .members
                .iter()
                .take(self.options.members as usize)
                .map(|host| host.v4)
                .collect(),
            replication: self.options.replication,
            scoring: self.options.scoring.clone(),
            cache: if self.options.cache { "all" } else { "off" }.to_owned(),
            handoff_fragment: self.options.handoff_fragment(),
            method: method_name(self.options.method()).to_owned(),
            service: self.world.service(),
            backends: self.backends.clone(),
            service_lines: self.options.service_lines(),
            cluster_lines: self.options.cluster_lines.clone(),
            forwarder: self.options.forwarder,
            forwarder_lines: self.options.forwarder_lines.clone(),
            pin_dir: None,
            protocol: if self.options.udp { "udp" } else { "tcp" },
            log_level: self.options.log_level.clone(),
        };
        let key = self.directory.path.join("cluster.key");
        self.members.iter().zip(&self.world.members).try_for_each(|(member, host)| {
            let weight = if self.drained.contains(&member.id) { 0 } else { WEIGHT };
            let pin_dir = self.pins.as_ref().map(|pins| pins.of(member.id));
            let file = ClusterFile { pin_dir, ..file.clone() };
            member.configure(&file.to_toml(member.id, host.v4, weight, &key))
        })
    }

    fn member(&mut self, id: u32) -> Result<(usize, &mut Member)> {
        let count = self.members.len();
        let index = (id as usize).checked_sub(1);
        index
            .and_then(|index| self.members.get_mut(index).map(|member| (index, member)))
            .with_context(|| format!("there is no member {id} in this lab: it has 1 to {count}"))
    }

    /// Does something to the site.
    pub fn carry_out(&mut self, action: Action) -> Result<()> {
        match action {
            Action::Kill(id) => {
                let (index, member) = self.member(id)?;
                member.kill()?;
                self.scraper.set_interest(index, Interest::Nothing);
            }
            Action::Crash(id) => {
                let (index, _) = self.member(id)?;
                self.world.members[index].cut()?;
                self.members[index].kill()?;
                self.scraper.set_interest(index, Interest::Nothing);
            }
            Action::Pause(id, length) => {
                let (index, member) = self.member(id)?;
                member.pause()?;
                self.scraper.set_interest(index, Interest::Nothing);
                self.resumes.push((Instant::now() + length, id));
            }
            Action::Join(id) => {
                let next = self.members.iter().find(|member| !member.has_process()).map(|member| member.id);
                let id = id.or(next).context("there is no member left to join: all run")?;
                let (index, member) = self.member(id)?;
                if member.has_process() {
                    bail!("member {id} runs already");
                }
                self.world.members[index].restore()?;
                self.members[index].start()?;
                self.scraper.set_interest(index, Interest::Ready);
            }
            Action::Leave(id) => {
                self.member(id)?.1.leave()?;
                self.router.withdraw(id);
            }
            Action::Restart(id) => {
                let (index, member) = self.member(id)?;
                member.kill()?;
                member.start()?;
                self.scraper.set_interest(index, Interest::Ready);
            }
            Action::Upgrade => self.upgrade()?,
            Action::AddBackend(id) => {
                let next = (1..=self.world.backends.len() as u32)
                    .find(|number| self.backends.iter().all(|line| line.number != *number));
                let number = id.or(next).context("there is no backend left to add")?;
                if number == 0 || number as usize > self.world.backends.len() {
                    bail!("there is no backend {number} in this lab");
                }
                match self.backends.iter_mut().find(|line| line.number == number) {
                    Some(line) => line.drain = false,
                    None => self.backends.push(self.backend_line(number)),
                }
                self.reconfigure()?;
            }
            Action::DrainBackend(number) => {
                let line = self
                    .backends
                    .iter_mut()
                    .find(|line| line.number == number)
                    .with_context(|| format!("there is no backend {number} to drain"))?;
                line.drain = true;
                self.reconfigure()?;
            }
            Action::CrashBackend(number) => {
                let host = (number as usize).checked_sub(1).and_then(|index| self.world.backends.get(index));
                host.with_context(|| format!("there is no backend {number} in this lab"))?.cut()?;
            }
            Action::Reload(Some(id)) => self.member(id)?.1.reload()?,
            Action::Reload(None) => self.reload_all()?,
            Action::Enter(id) => {
                if let Some(id) = id {
                    // Only to have a clear message where there is none.
                    self.member(id)?;
                }
                self.router.pin(id);
            }
            Action::Partition(id, length) => {
                self.member(id)?;
                self.begin_weather(Weather::Cut, Some(id), length)?;
            }
            Action::Split(id, length) => {
                self.member(id)?;
                let others = self.world.members.iter().filter(|host| host.number != id).map(|host| host.v4);
                let others = v4_addresses(others);
                self.begin_weather(Weather::Split(others), Some(id), length)?;
            }
            Action::Loss(share, length) => self.begin_weather(Weather::Loss(share), None, length)?,
            Action::Drain(id) | Action::Undrain(id) => {
                self.member(id)?;
                if matches!(action, Action::Drain(_)) {
                    self.drained.insert(id);
                } else {
                    self.drained.remove(&id);
                }
                self.configure_all()?;
                self.member(id)?.1.reload()?;
            }
            Action::FailBackend(number) | Action::MendBackend(number) => {
                if number == 0 || number as usize > self.world.backends.len() {
                    bail!("there is no backend {number} in this lab");
                }
                let fails = matches!(action, Action::FailBackend(_));
                let traffic = self.traffic.as_ref().context("the lab's own servers do not run")?;
                traffic.set_ill(number, fails);
                if fails {
                    self.failing.insert(number);
                } else {
                    self.failing.remove(&number);
                }
            }
        }
        // What the router must know at once, it learns at once.
        self.poll()
    }

    fn reconfigure(&self) -> Result<()> {
        self.configure_all()?;
        self.reload_all()
    }

    fn reload_all(&self) -> Result<()> {
        self.members.iter().try_for_each(Member::reload)
    }

    /// Looks after processes and the router. Call it every few hundredths of a second.
    pub fn poll(&mut self) -> Result<()> {
        let now = Instant::now();
        for at in (0..self.resumes.len()).rev() {
            if self.resumes[at].0 <= now {
                let (_, id) = self.resumes.swap_remove(at);
                let (index, member) = self.member(id)?;
                // It may have been killed meanwhile.
                if member.has_process() {
                    member.resume()?;
                    self.scraper.set_interest(index, Interest::Ready);
                    self.say(&format!("member {id} goes on"));
                }
            }
        }
        self.end_weather(now)?;
        self.returning.retain(|(at, _)| *at > now);
        let mut ended = Vec::new();
        for (index, member) in self.members.iter_mut().enumerate() {
            let had_process = member.has_process();
            ended.extend(member.poll_exit()?);
            if had_process && !member.has_process() {
                self.scraper.set_interest(index, Interest::Nothing);
            }
            let alive = member.is_running()
                && self.scraper.is_ready(index)
                && !Self::is_cut(&self.lasting, member.id)
                && !self.returning.iter().any(|(_, id)| *id == member.id);
            self.router.handle_liveness(member.id, alive, now);
        }
        for how in ended {
            self.say(&how);
            self.problems.push(how);
        }
        // A decapsulator that ended is told once, and taken off the list.
        for at in (0..self.decapsulators.len()).rev() {
            if let Some(status) = self.decapsulators[at].child.try_wait()? {
                let gone = self.decapsulators.swap_remove(at);
                self.problems
                    .push(format!("the decapsulator of backend {} ended with {status}", gone.backend));
            }
        }
        self.router.poll(now)
    }

    /// Builds nothing more, runs everything, reports.
    pub(super) fn run(mut self) -> Result<Report> {
        self.start_members()?;
        let total = self.options.long_lived();
        let options = TrafficOptions {
            target: self.world.target(),
            connections: self.options.connections,
            uploads: self.options.uploads,
            idle: self.options.idle,
            half_closed: self.options.half_closed,
            short_rate: self.options.short_rate,
            interval: self.options.interval,
            ramp: self.options.ramp,
        };
        if let Some(traffic) = &mut self.traffic {
            traffic.start_clients(&self.world.client, options)?;
        }
        self.start = Instant::now();
        self.open_window("opening");
        // A connect that fails takes 30 s to be declared broken.
        let opening = Duration::from_secs(total / u64::from(self.options.ramp.max(1))) + FINISH_TIMEOUT;
        loop {
            let counts = self.counts();
            if counts.long_live + counts.broken >= total || self.is_interrupted() {
                break;
            }
            if self.start.elapsed() > opening {
                self.problems.push(format!("only {} of {total} connections opened", counts.long_live));
                break;
            }
            self.step()?;
        }
        let opened_after = self.start.elapsed();
        self.start = Instant::now();
        if let Some(first) = self.windows.first_mut() {
            first.at_s = -opened_after.as_secs_f64();
        }
        self.open_window("start");
        match self.options.chaos {
            Some(seed) => {
                self.watch_closely();
                self.chaos(seed)?;
            }
            None => self.events()?,
        }
        self.finish()
    }

    fn events(&mut self) -> Result<()> {
        let mut events: VecDeque<Event> = self.options.events.iter().copied().collect();
        events.make_contiguous().sort_by_key(|event| event.at);
        let duration = self.options.duration();
        while self.start.elapsed() < duration && !self.is_interrupted() {
            while events.front().is_some_and(|event| event.at <= self.start.elapsed()) {
                let Some(event) = events.pop_front() else { break };
                let share = self.open_window(&event.action.to_string());
                if event.action.changes_members() && self.deviating.is_none() {
                    self.deviating = share;
                }
                self.say(&event.action.to_string());
                self.last_event = event.action.to_string();
                if let Err(error) = self.carry_out(event.action) {
                    self.problems.push(format!("cannot {}: {error:#}", event.action));
                }
            }
            self.step()?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        self.poll()?;
        self.tell_broken();
        self.show();
        sleep(TICK);
        Ok(())
    }

    fn is_interrupted(&self) -> bool {
        self.options.interrupt.load(Ordering::Relaxed)
    }

    fn counts(&self) -> super::traffic::Counts {
        self.traffic.as_ref().map(|traffic| traffic.ledger().counts()).unwrap_or_default()
    }

    /// The share of live connections whose backend is not the one the consistent table would give now.
    pub fn deviating_share(&mut self) -> Option<f64> {
        let target = self.world.target();
        // One that fails its health check gets no new flows either.
        let usable: Vec<BackendLine> = self
            .backends
            .iter()
            .map(|line| BackendLine { drain: line.drain || self.failing.contains(&line.number), ..*line })
            .collect();
        let table = ConsistentTable::new(target, self.options.method(), GUE_PORT, &usable);
        let live = self.traffic.as_ref()?.ledger().live();
        if self.options.direct {
            return None;
        }
        if !self.cross_checked {
            self.cross_checked = true;
            let sources = live.iter().take(CROSS_CHECKS).map(|live| live.source);
            let ready = (0..self.members.len()).find(|index| self.scraper.is_ready(*index));
            for (source, index) in sources.zip(ready.into_iter().cycle()) {
                let netns = &self.world.members[index].netns;
                let path = format!("/v1/explain?src={source}&dst={target}&protocol=tcp");
                let Ok((200, body)) = metrics::get(netns, &path) else { continue };
                let theirs = serde_json::from_str::<serde_json::Value>(&body).ok().and_then(|answer| {
                    answer["consistent_backend"].as_str().and_then(|text| text.parse::<IpAddr>().ok())
                });
                let ours = table.backend_of(source).map(|number| self.backend_address(number));
                if theirs.is_some() && theirs != ours {
                    self.problems.push(format!(
                        "the lab and member {} disagree on the consistent backend of {source}: {ours:?}, {theirs:?}",
                        index + 1
                    ));
                    break;
                }
            }
        }
        table.deviating_share(&live)
    }

    fn open_window(&mut self, what: &str) -> Option<f64> {
        let deviating_share = self.deviating_share();
        let live = self.counts().live;
        if let Some(traffic) = &self.traffic
            && !self.windows.is_empty()
        {
            traffic.ledger().start_window();
        }
        self.windows.push(EventReport {
            at_s: self.start.elapsed().as_secs_f64(),
            what: what.to_owned(),
            live,
            deviating_share,
            ..EventReport::default()
        });
        deviating_share
    }

    /// Ends the traffic, asks the members for their last counters, ends them too, and reports.
    pub fn finish(mut self) -> Result<Report> {
        let duration = self.start.elapsed();
        // A window of its own: when all connections say their last word at once, they wait for each other.
        let at_end = self.open_window("ending");
        if let Some(traffic) = &self.traffic {
            traffic.stop();
        }
        let stopping = Instant::now();
        while let Some(traffic) = &self.traffic {
            if traffic.is_finished() || self.is_interrupted() {
                break;
            }
            if stopping.elapsed() > FINISH_TIMEOUT {
                self.problems.push("connections did not end".to_owned());
                break;
            }
            self.step()?;
        }
        self.scraper.refresh();
        self.clear_line();
        let report = self.report(duration, at_end)?;
        self.stop_members();
        Ok(report)
    }

    fn report(&mut self, duration: Duration, at_end: Option<f64>) -> Result<Report> {
        let totals = self.scraper.totals();
        let by_label = |metric: &str, label: &str| -> BTreeMap<String, u64> {
            let prefix = format!("{metric}{{");
            let mut counts = BTreeMap::new();
            for (name, value) in &totals {
                if name.starts_with(&prefix)
                    && let Some(key) = metrics::label(name, label)
                    && *value > 0.0
                {
                    *counts.entry(key.to_owned()).or_default() += *value as u64;
                }
            }
            counts
        };
        let handoffs = by_label("phalanx_handoffs_total", "direction");
        let mut report = Report {
            topology: self.options.topology,
            method: if self.options.direct { "direct" } else { method_name(self.options.method()) }
                .to_owned(),
            members: if self.options.direct { 0 } else { self.options.members },
            backends: self.options.backends,
            forwarder: self.options.forwarder.as_str().to_owned(),
            replication: self.options.replication,
            duration_s: duration.as_secs_f64(),
            deviating_share: self.deviating.or(at_end),
            deviating_share_at_end: at_end,
            handed_off: handoffs.get("out").copied().unwrap_or_default(),
            verdicts: by_label("phalanx_packets_total", "verdict"),
            drops: by_label("phalanx_drops_total", "reason"),
            recovered: totals.get("phalanx_recovered_total").copied().unwrap_or_default() as u64,
            table_full: totals.get("phalanx_table_full_total").copied().unwrap_or_default() as u64,
            problems: self.problems.clone(),
            interrupted: self.is_interrupted(),
            ..Report::default()
        };
        let Some(traffic) = self.traffic.take() else { return Ok(report) };
        let ledger = traffic.ledger().clone();
        if traffic.is_finished() {
            traffic.join()?;
        }
        let counts = ledger.counts();
        report.attempted = counts.attempted;
        report.opened = counts.opened;
        report.completed = counts.completed;
        report.broken = counts.broken;
        report.bytes = counts.bytes;
        for broken in ledger.broken() {
            *report.broken_causes.entry(broken.cause).or_default() += 1;
        }
        let chaos = self.options.chaos.map(|seed| self.chaos_report(seed, &ledger));
        report.events = std::mem::take(&mut self.windows);
        for (event, window) in report.events.iter_mut().zip(ledger.windows()) {
            event.measure(&window);
        }
        report.chaos = chaos;
        Ok(report)
    }

    fn stop_members(&mut self) {
        for member in &mut self.members {
            // A member that cannot be told to leave is killed when it is dropped.
            let _ = member.leave();
        }
        let start = Instant::now();
        while start.elapsed() < LEAVE_TIMEOUT && self.members.iter().any(Member::has_process) {
            for member in &mut self.members {
                let _ = member.poll_exit();
            }
            sleep(TICK);
        }
    }

    fn say(&self, text: &str) {
        if self.options.progress {
            self.clear_line();
            eprintln!("{:>6.1} s  {text}", self.start.elapsed().as_secs_f64());
        }
    }

    fn clear_line(&self) {
        if self.options.progress && std::io::stderr().is_terminal() {
            eprint!("\r\x1b[2K");
        }
    }

    fn show(&mut self) {
        if !self.options.progress {
            return;
        }
        let terminal = std::io::stderr().is_terminal();
        let period = if terminal { PROGRESS_PERIOD } else { LOG_PROGRESS_PERIOD };
        if self.shown.is_some_and(|shown| shown.elapsed() < period) {
            return;
        }
        self.shown = Some(Instant::now());
        let counts = self.counts();
        let running = (0..self.members.len()).filter(|index| self.scraper.is_ready(*index)).count();
        let handed_off: f64 = self
            .scraper
            .totals()
            .iter()
            .filter(|(name, _)| name.starts_with("phalanx_handoffs_total") && name.contains("\"out\""))
            .map(|(_, value)| value)
            .sum();
        let line = format!(
            "{:>6.1} s  members {running}  connections {} live, {} opened, {} completed, {} broken  handed off {}{}{}",
            self.start.elapsed().as_secs_f64(),
            counts.live,
            counts.opened,
            counts.completed,
            counts.broken,
            handed_off as u64,
            if self.last_event.is_empty() { "" } else { "  last: " },
            self.last_event,
        );
        if terminal {
            eprint!("\r\x1b[2K{line}");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{line}");
        }
    }
}

const fn method_name(method: Method) -> &'static str {
    match method {
        Method::L2 => "l2",
        Method::IpIp => "ipip",
        Method::Gue => "gue",
    }
}

/// A backend's `phalanx decap`, killed when dropped.
#[derive(Debug)]
struct Decapsulator {
    backend: u32,
    child: Child,
}

impl Drop for Decapsulator {
    fn drop(&mut self) {
        // One that has ended already cannot be killed, and that is well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where configurations and logs are.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    /// Deletes it when dropped; `None` where the caller keeps it.
    _temporary: Option<tempfile::TempDir>,
}

impl Directory {
    fn new(keep: Option<&Path>) -> Result<Self> {
        match keep {
            Some(path) => {
                std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
                // A key of an earlier run would be in the way.
                let _ = std::fs::remove_file(path.join("cluster.key"));
                let path = path.canonicalize()?;
                Ok(Self { path, _temporary: None })
            }
            None => {
                let temporary = tempfile::Builder::new().prefix("phalanx-lab-").tempdir()?;
                Ok(Self { path: temporary.path().to_owned(), _temporary: Some(temporary) })
            }
        }
    }
}
