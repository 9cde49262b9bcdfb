// Before anything is painted: the colors that were chosen here, if the system's were not.
try {
  document.documentElement.dataset.theme = localStorage.getItem("msa-theme") ?? "system";
} catch {
  document.documentElement.dataset.theme = "system";
}
