"""Each table and figure of the report, and what reproduces it here.

The report has two versions, which number figures differently. `bin/reproduce`
names its targets after the version of the ML Reproducibility Challenge
(arXiv:2103.15767). The journal version (ReScience C, 2021) has more figures.
"""

import dataclasses

__all__ = ["ITEMS", "Item", "as_list"]


@dataclasses.dataclass(frozen=True)
class Item:
    """A table or figure.

    Args:
        target: What `bin/reproduce` and `bin/report` call it.
        title: What it shows, in a few words.
        challenge: Its number in the version of the challenge, `""` for none.
        journal: Its number in the version of the journal, `""` for none.
        command: The command that trains its runs. `""`: it needs no run.
    """

    target: str
    title: str
    challenge: str = ""
    journal: str = ""
    command: str = "bin/reproduce"

    @property
    def numbers(self) -> str:
        """Its number, and that of the journal version where it is another."""
        if not self.challenge and not self.journal:
            return "not in the report"
        if not self.challenge:
            return f"journal: {self.journal}"
        if self.journal == self.challenge:
            return self.challenge
        return f"{self.challenge}, journal: {self.journal}"


ITEMS = (
    Item("table1", "as the authors, on 50,000 images", *["Table 1"] * 2),
    Item("table2", "WRN-22-2 on CIFAR-10", *["Table 2"] * 2),
    Item("table3", "ResNet-50 on CIFAR-100", *["Table 3"] * 2),
    Item("table4", "tuned drop fraction and frequency", *["Table 4"] * 2),
    Item("table5", "redistribution, re-initialisation", *["Table 5"] * 2),
    Item("table7", "RigL-Struct, whole kernels", "", "Table 7"),
    Item("figure1", "CIFAR-10 over density", *["Figure 1(a, b)"] * 2),
    Item("figure1c", "CIFAR-10 at twice the length", *["Figure 1(c)"] * 2),
    Item("cifar100", "CIFAR-100 over density", "beside Table 3", "Figure 2"),
    Item("figure2", "learning rates", "Figure 2", "Figure 3"),
    Item("figure3", "equal FLOPs, CIFAR-10", "Figure 3", "Figure 4(a)"),
    Item("figure3b", "equal FLOPs, CIFAR-100", "", "Figure 4(b)"),
    Item("figure4", "what redistribution does", "Figure 4", "Figure 5"),
    Item("flops", "FLOPs over density", "", "FLOPs over density", ""),
    Item("tuning", "the search", "supplement", "appendix", "bin/tune updates"),
    Item("methods", "RigL beside later methods"),
)


def as_list() -> str:
    """Returns the items as text, a line each, at most 80 columns."""
    lines = [f"{item.target:10}{item.title:36}{item.numbers}" for item in ITEMS]
    return "\n".join(
        [
            *lines,
            "",
            "bin/reproduce trains the runs of an item, bin/report draws it.\n"
            "bin/tune updates trains those of tuning; flops needs no run.",
        ]
    )
