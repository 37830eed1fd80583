//! A guest without KVM: a thread that writes its memory, a dirty log in software, one section of state.

#![allow(unreachable_pub, missing_docs, dead_code)] // a part of several test programs

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use mig::describe::{Region, Schema};
use mig::policy::Throttle;
use mig::{
    Bitmap, BoxError, Description, DestinationVm, DirtyTracker, Domain, GuestRam, Incoming, Refusal,
    RestoreState, RunPermit, SaveState, Section, SourceVm, VmControl,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const PAGE: u64 = 4096;

/// What goes wrong, on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flaw {
    #[default]
    None,
    /// The guest writes this page last, and the dirty log forgets it.
    ForgetsPage(u64),
    /// The dirty log reports every page every time.
    ReportsEveryPage,
    /// It reports every page the first two times, and then those that the guest has written and it has not reported.
    ReportsEveryPageTwice,
    FailsToPause,
    /// It reports every page every time as well.
    FailsToThrottle,
    FailsToSave,
    FailsToRestore,
    FailsToResume,
    /// Restoring takes so long.
    SlowRestore(Duration),
    /// Its state has so many bytes more than it needs.
    LargeState(usize),
}

/// What the guest's thread and its owner share.
struct Shared {
    memory: Arc<GuestMemoryMmap>,
    regions: Vec<Region>,
    domain: Domain,
    dirty: Vec<AtomicU64>,
    /// Held by the thread while it writes, by the owner while the guest is paused.
    running: Mutex<bool>,
    ended: AtomicBool,
    writes: AtomicU64,
    pause_between_writes: Duration,
    /// By how much it is slowed, in percent; each change.
    throttles: Mutex<Vec<u8>>,
}

/// The guest.
pub struct Model {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    tracker: Log,
    flaw: Flaw,
}

struct Log {
    shared: Arc<Shared>,
    flaw: Flaw,
    pub started: bool,
    syncs: u32,
}

pub fn regions(pages: u64) -> Vec<Region> {
    let low = pages * 3 / 4;
    vec![
        Region { guest_address: 0, bytes: low * PAGE },
        Region { guest_address: 1 << 32, bytes: (pages - low) * PAGE },
    ]
}

impl Model {
    /// A paused guest with zeroed memory.
    pub fn new(regions: &[Region], pause_between_writes: Duration, flaw: Flaw) -> Self {
        let ranges: Vec<_> =
            regions.iter().map(|r| (GuestAddress(r.guest_address), r.bytes as usize)).collect();
        let domain = Domain::new(regions).unwrap();
        let shared = Arc::new(Shared {
            memory: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
            regions: regions.to_vec(),
            dirty: (0..domain.end_page().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            domain,
            running: Mutex::new(false),
            ended: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            pause_between_writes,
            throttles: Mutex::default(),
        });
        let guest = shared.clone();
        let thread = Some(std::thread::spawn(move || guest.live()));
        Self { tracker: Log { shared: shared.clone(), flaw, started: false, syncs: 0 }, shared, thread, flaw }
    }

    /// A running guest that has written every page but the last of each region.
    pub fn running(pages: u64, pause_between_writes: Duration, flaw: Flaw) -> Self {
        let model = Self::new(&regions(pages), pause_between_writes, flaw);
        for extent in model.shared.domain.extents() {
            for page in 0..extent.pages - 1 {
                let address = GuestAddress(extent.guest_address + page * PAGE);
                model.shared.memory.write_obj(extent.first_page + page + 1, address).unwrap();
            }
        }
        model.run();
        model
    }

    pub fn run(&self) {
        *self.shared.running.lock().unwrap() = true;
    }

    pub fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// By how many percent it was slowed, one after the other.
    pub fn throttles(&self) -> Vec<u8> {
        self.shared.throttles.lock().unwrap().clone()
    }

    /// The same, whoever has the guest by then.
    pub fn watch(&self) -> impl Fn() -> Vec<u8> + use<> {
        let shared = self.shared.clone();
        move || shared.throttles.lock().unwrap().clone()
    }

    pub fn is_tracked(&self) -> bool {
        self.tracker.started
    }

    /// The first byte of a page of the first region, which the guest itself never writes.
    pub fn first_byte(&self, page: u64) -> u8 {
        self.shared.memory.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    /// Waits until it has written more.
    pub fn makes_progress(&self) -> bool {
        let before = self.writes();
        (0..5000).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            self.writes() > before
        })
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Shared {
    /// Writes pages all over memory, so that a lost one is found by digests.
    fn live(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            let running = self.running.lock().unwrap();
            if !*running {
                drop(running);
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let write = self.writes.fetch_add(1, Ordering::Relaxed) + 1;
            let extents = self.domain.extents();
            let extent = extents[(write % extents.len() as u64) as usize];
            let page = (write.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % extent.pages;
            self.memory.write_obj(write, GuestAddress(extent.guest_address + page * PAGE + 8)).unwrap();
            // after the write: a mark that a re-arm takes away came before the page is read
            self.mark(extent.first_page + page);
            drop(running);
            if !self.pause_between_writes.is_zero() {
                let kept = 100 - self.throttles.lock().unwrap().last().copied().unwrap_or(0);
                std::thread::sleep(self.pause_between_writes * 100 / u32::from(kept));
            }
        }
    }

    fn mark(&self, page: u64) {
        self.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
    }
}

impl DirtyTracker for Log {
    fn start(&mut self) -> Result<(), BoxError> {
        self.started = true;
        Ok(())
    }

    fn sync(&mut self, dirty: &mut Bitmap) -> Result<(), BoxError> {
        self.syncs += 1;
        let all = match self.flaw {
            Flaw::ReportsEveryPage | Flaw::FailsToThrottle => true,
            Flaw::ReportsEveryPageTwice => self.syncs <= 2,
            _ => false,
        };
        if all {
            *dirty = Bitmap::full(&self.shared.domain);
        }
        for (index, word) in self.shared.dirty.iter().enumerate() {
            let mut word = match self.flaw {
                Flaw::ReportsEveryPageTwice => word.swap(0, Ordering::SeqCst),
                _ => word.load(Ordering::SeqCst),
            };
            if let Flaw::ForgetsPage(page) = self.flaw
                && page / 64 == index as u64
            {
                word &= !(1 << (page % 64));
            }
            dirty.or_words(index as u64 * 64, &[word]);
        }
        Ok(())
    }

    fn rearm(&self, first_page: u64, words: &[u64]) -> Result<(), BoxError> {
        for (index, word) in words.iter().enumerate() {
            self.shared.dirty[(first_page / 64) as usize + index].fetch_and(!word, Ordering::SeqCst);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), BoxError> {
        self.started = false;
        Ok(())
    }
}

impl VmControl for Model {
    fn pause(&mut self) -> Result<(), BoxError> {
        *self.shared.running.lock().unwrap() = false;
        if let Flaw::ForgetsPage(page) = self.flaw {
            let address = self.shared.domain.guest_address(page).ok_or("no such page")?;
            self.shared.memory.write_obj(u64::MAX, GuestAddress(address + 24))?;
        }
        if self.flaw == Flaw::FailsToPause { Err("a vCPU does not stop".into()) } else { Ok(()) }
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<(), BoxError> {
        if self.flaw == Flaw::FailsToThrottle {
            return Err("there is no thread for it".into());
        }
        self.shared.throttles.lock().unwrap().push(throttle.percent());
        Ok(())
    }

    fn resume(&mut self, _: RunPermit) -> Result<(), BoxError> {
        if self.flaw == Flaw::FailsToResume {
            return Err("a vCPU does not start".into());
        }
        self.run();
        Ok(())
    }
}

impl SaveState for Model {
    fn save(&mut self) -> Result<Vec<Section>, BoxError> {
        if self.flaw == Flaw::FailsToSave {
            return Err("a register cannot be read".into());
        }
        // saving writes guest memory, as paravirtual state does
        self.shared.memory.write_obj(0xfeed_u64, GuestAddress(16))?;
        self.shared.mark(0);
        let mut sections = vec![Section::critical("model", 0, 1, &self.writes())];
        if let Flaw::LargeState(bytes) = self.flaw {
            let body = vec![7; bytes];
            sections.push(Section { name: "ballast".into(), instance: 0, version: 1, critical: false, body });
        }
        Ok(sections)
    }
}

impl RestoreState for Model {
    fn restore(&mut self, sections: &[Section]) -> Result<(), BoxError> {
        match self.flaw {
            Flaw::FailsToRestore => return Err("a register cannot be written".into()),
            Flaw::SlowRestore(time) => std::thread::sleep(time),
            _ => {}
        }
        let Some(section) = sections.first() else { return Err("a section expected".into()) };
        self.shared.writes.store(mig::body::decode("model", &section.body)?, Ordering::Relaxed);
        Ok(())
    }
}

impl SourceVm for Model {
    fn describe(&self) -> Result<Description, BoxError> {
        Ok(Description {
            architecture: "model".into(),
            page_bytes: 4096,
            vcpus: 1,
            regions: self.shared.regions.clone(),
            boot_id: None,
            schemas: vec![Schema { name: "model".into(), version: 1 }],
            platform: Vec::new(),
        })
    }

    fn memory(&self) -> GuestRam {
        GuestRam::from_vm_memory(self.shared.memory.clone())
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }
}

impl DestinationVm for Model {
    fn memory(&self) -> GuestRam {
        GuestRam::from_vm_memory(self.shared.memory.clone())
    }

    fn resume(&mut self, permit: RunPermit) -> Result<(), BoxError> {
        VmControl::resume(self, permit)
    }

    fn guest_gap(&mut self, _: Duration) -> Option<Duration> {
        Some(Duration::from_micros(1234))
    }
}

/// Takes models.
#[derive(Default)]
pub struct Host {
    pub flaw: Flaw,
    pub max_bytes: Option<u64>,
}

impl Incoming for Host {
    type Vm = Model;

    fn prepare(&mut self, description: &Description) -> Result<Model, Vec<Refusal>> {
        let needed: u64 = description.regions.iter().map(|r| r.bytes).sum();
        match self.max_bytes {
            Some(limit) if needed > limit => Err(vec![
                Refusal::new("memory", format!("{needed} bytes needed, {limit} free"), "free some memory"),
                Refusal::new("colour", "blue is not green", ""),
            ]),
            _ => Ok(Model::new(&description.regions, Duration::ZERO, self.flaw)),
        }
    }
}
