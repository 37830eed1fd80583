//! Dependencies point one way: wire <- core <- sim; {wire, core} <- mig <- kvm <- vmm <- cli.
//!
//! Read from `cargo metadata`, so that a new dependency that turns the arrows round fails here, with its name.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// What each crate may depend on, of this workspace and of what is forbidden to some.
const MAY_USE: &[(&str, &[&str])] = &[
    ("mig-wire", &[]),
    ("mig-core", &["mig-wire"]),
    ("mig-sim", &["mig-core", "mig-wire"]),
    ("mig", &["mig-core", "mig-wire"]),
    ("mig-kvm", &["mig"]),
    ("mig-vmm", &["mig", "mig-kvm"]),
    ("mig-cli", &["mig", "mig-vmm"]),
    ("mig-benches", &["mig-wire", "mig-core", "mig", "mig-kvm", "mig-vmm"]),
    ("mig-guest-watch", &[]),
    ("mig-hostile", &["mig-wire", "mig-core", "mig", "mig-vmm"]),
    ("mig-tests", &["mig-wire", "mig-core", "mig", "mig-kvm", "mig-vmm", "mig-cli"]),
];

/// Crates that bring sockets, threads, guest memory or KVM, and who must not see them.
const NEVER: &[(&str, &[&str])] = &[
    (
        "mig-wire",
        &["libc", "nix", "socket2", "crossbeam", "vm-memory", "kvm-ioctls", "kvm-bindings", "vmm-sys-util"],
    ),
    (
        "mig-core",
        &["libc", "nix", "socket2", "crossbeam", "vm-memory", "kvm-ioctls", "kvm-bindings", "vmm-sys-util"],
    ),
    (
        "mig-sim",
        &["libc", "nix", "socket2", "crossbeam", "vm-memory", "kvm-ioctls", "kvm-bindings", "vmm-sys-util"],
    ),
    ("mig", &["kvm-ioctls", "kvm-bindings", "vmm-sys-util"]),
    ("mig-kvm", &["socket2", "mig-wire", "mig-core"]),
];

/// The direct dependencies of each member, without those of tests alone.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata runs");
    let members = metadata.workspace_packages();
    members
        .into_iter()
        .map(|package| {
            let direct = package.dependencies.iter().filter(|d| d.kind != DependencyKind::Development);
            (package.name.to_string(), direct.map(|d| d.name.clone()).collect())
        })
        .collect()
}

/// The arrows that break the law.
fn offences(dependencies: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let members: BTreeSet<&str> = dependencies.keys().map(String::as_str).collect();
    let mut offences = Vec::new();
    for (package, used) in dependencies {
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| name == package) else {
            offences.push(format!("{package} has no place in the layering"));
            continue;
        };
        let own = used.iter().filter(|u| members.contains(u.as_str()) && !allowed.contains(&u.as_str()));
        offences.extend(own.map(|u| format!("{package} -> {u}")));
        let forbidden = NEVER.iter().find(|(name, _)| name == package).map_or(&[][..], |(_, f)| f);
        let foreign = used.iter().filter(|u| forbidden.contains(&u.as_str()));
        offences.extend(foreign.map(|u| format!("{package} -> {u}")));
    }
    offences
}

#[test]
fn dependencies_point_one_way() {
    assert_eq!(offences(&dependencies()), Vec::<String>::new());
}

#[test]
fn an_arrow_the_other_way_is_found() {
    let mut dependencies = dependencies();
    dependencies.get_mut("mig-core").unwrap().extend(["mig".to_owned(), "vm-memory".to_owned()]);
    dependencies.insert("mig-odd".to_owned(), BTreeSet::new());
    let found = ["mig-core -> mig", "mig-core -> vm-memory", "mig-odd has no place in the layering"];
    assert_eq!(offences(&dependencies), found);
}

#[test]
fn the_pure_crates_forbid_unsafe_code() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root");
    for package in ["mig-wire", "mig-core", "mig-sim"] {
        let file = root.join("crates").join(package).join("src/lib.rs");
        let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert!(text.contains("#![forbid(unsafe_code)]"), "{package}");
    }
}
