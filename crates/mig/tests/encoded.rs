//! A guest moves with its pages encoded, over real sockets, and every digest of its memory agrees.

mod model;

use std::time::Duration;

use mig::observe::{PageCounts, Report, Verification};
use mig::policy::Policy;
use mig::{
    Address, Compress, Control, Listener, Outcome, ReceiveOptions, Received, SourceOptions, migrate, receive,
};
use model::{Flaw, Host, Model};

/// The report of a guest that moved and goes on there, with digests that agree.
fn moved(vm: Model, compress: &str, channels: u16, policy: Policy) -> Report {
    moved_with(vm, compress, channels, policy, None)
}

fn moved_with(
    vm: Model,
    compress: &str,
    channels: u16,
    policy: Policy,
    delta_cache_bytes: Option<u64>,
) -> Report {
    let compress: Compress = compress.parse().unwrap();
    let channels = Some(channels);
    let options =
        SourceOptions { policy, channels, compress, delta_cache_bytes, verify: true, ..Default::default() };
    let listener = Listener::bind(&Address::tcp("127.0.0.1", 0)).unwrap();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &Control::new(), &())
        });
        let outcome = migrate(vm, listener.address(), &options, &Control::new(), &());
        let report = match outcome {
            Outcome::Moved(report) => report,
            Outcome::StillHere { report, .. } | Outcome::Discarded(report) => panic!("{report:?}"),
        };
        let Received::Running { vm, report: receipt } = receiving.join().unwrap() else {
            panic!("not running")
        };
        assert!(vm.makes_progress(), "the guest goes on at the destination");
        assert!(matches!(report.verification, Verification::Ok { .. }), "{:?}", report.verification);
        assert_eq!((report.pages, report.sent_bytes), (receipt.pages, receipt.received_bytes));
        report
    })
}

#[test]
fn compressed_pages_arrive_as_they_were_while_the_guest_writes_them() {
    for (compress, channels) in [("zstd", 1), ("zstd:9", 3)] {
        let vm = Model::running(6000, Duration::from_micros(20), Flaw::None);
        let report = moved(vm, compress, channels, Policy::default());
        let PageCounts { zero, raw, zstd, delta } = report.pages;
        assert!(zstd >= 5998 && raw == 0 && delta == 0 && zero >= 1, "{:?}", report.pages);
        assert!(report.sent_bytes < 6000 * 400, "{} bytes: they shrink well", report.sent_bytes);
    }
}

#[test]
fn what_changed_of_pages_arrives_as_it_is_while_the_guest_writes_them() {
    // chunks do not divide evenly by three: one channel's part of the cache is smaller than what it sends
    for (channels, cache_bytes, kept) in
        [(1, None, 2990..3001), (3, None, 2500..3000), (2, Some(1000 * 4096), 900..1001)]
    {
        // every page is sent in every round, whether the guest wrote it or not
        let vm = Model::running(3000, Duration::from_micros(5), Flaw::ReportsEveryPage);
        let policy = Policy {
            max_rounds: 6,
            downtime_limit: Duration::ZERO,
            no_progress_rounds: 99,
            traffic_factor: 99,
            ..Policy::default()
        };
        let report = moved_with(vm, "delta", channels, policy, cache_bytes);
        let PageCounts { raw, zstd, delta, .. } = report.pages;
        assert!(report.rounds > 5 && kept.contains(&(delta / u64::from(report.rounds - 2))), "{report:?}");
        assert!(zstd == 0 && raw >= 2 * 2990);
    }
}

/// Which pages are encoded depends on what it measures.
#[test]
fn pages_that_are_encoded_where_it_pays_arrive_as_they_are() {
    for (channels, flaw) in [(1, Flaw::None), (2, Flaw::ReportsEveryPage)] {
        let vm = Model::running(3000, Duration::from_micros(5), flaw);
        let policy =
            Policy { max_rounds: 20, no_progress_rounds: 99, traffic_factor: 99, ..Policy::default() };
        let report = moved(vm, "auto", channels, policy);
        assert!(report.pages.total() >= 3000);
    }
}

#[test]
fn without_compression_every_page_goes_raw() {
    let vm = Model::running(3000, Duration::from_micros(20), Flaw::None);
    let PageCounts { raw, zstd, delta, .. } = moved(vm, "off", 2, Policy::default()).pages;
    assert!(raw >= 2998 && zstd == 0 && delta == 0);
}
